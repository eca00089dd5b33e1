"""Requests cannot make the server talk to what only the server can reach."""

from __future__ import annotations

import ipaddress

import pytest
from yarl import URL

from llmstream.errors import BadRequest
from llmstream.webhooks.reach import Reach, is_public
from llmstream.webhooks.sender import Sender
from tests.webhooks.receiver import Receiver

PRIVATE = [
    *("127.0.0.1", "127.255.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
    *("100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "fe80::1", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1"),
    *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
    *("2002:7f00:1::", "2002:a9fe:a9fe::1", "2001:0:4136:e378:8000:63bf:80ff:fffe"),
]
PUBLIC = ["1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(address: str) -> None:
    """Loopback, private, link-local, metadata, reserved and multicast, also inside an address of version 6."""
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    """What everybody can reach is allowed."""
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        *("", "hook", "ftp://example.com/", "file:///etc/passwd", "https://", "https:///path", "javascript:alert(1)"),
        *("http://example.com/", "https://user@example.com/", "https://:pw@example.com/", "https://user:pw@example.com/"),
        *("https://127.0.0.1/", "https://[::1]/", "https://[::ffff:7f00:1]/", "https://169.254.169.254/latest"),
        *("https://localhost/", "https://LOCALHOST./", "https://a.localhost/", "https://metadata.google.internal/"),
        *("https://redis/", "https://printer.local/", "https://db.corp/", "https://example.com:22/", "https://example.com:80/"),
        *("https://example.com:99999/", "https://example.com:0/", "https://exa mple.com/", "https://example.com/\n"),
        *("https://2130706433/", "https://127.1/", "https://0x7f.1/", "https://0177.0.0.1/"),
        *("https://example.com/ä", "https://example.com\\@evil/", "https://example.com/" + "x" * 2048),
    ],
)  # fmt: skip
def test_urls_that_requests_must_not_name(url: str) -> None:
    """Refused with the field's name, and without the URL, which may hold a password."""
    with pytest.raises(BadRequest) as refused:
        Reach().check(url)
    assert refused.value.param == "webhook.url"
    assert "pw" not in refused.value.message
    assert len(url) < 9 or url not in refused.value.message


@pytest.mark.parametrize(
    ("url", "allow"),
    [
        ("https://example.com/hook?key=1", []),
        ("https://example.com:8443/", []),
        ("https://1.1.1.1/", []),
        ("http://127.0.0.1:9/", ["127.0.0.0/8"]),
        ("http://[::1]:9/", ["::1"]),
        ("http://hooks.internal/", ["hooks.internal"]),
        ("http://a.corp:22/", ["*.corp"]),
        ("https://10.0.0.7/", ["10.0.0.0/8"]),
    ],
)
def test_urls_that_requests_may_name(url: str, allow: list[str]) -> None:
    """Public hosts over https, and whatever the configuration lists."""
    assert str(Reach(allow).check(url)) == url


def test_allowing_one_host_allows_no_other() -> None:
    """Neither a name that ends alike nor another network."""
    reach = Reach(["hooks.internal", "10.0.0.0/8"])
    for url in (
        "https://evil-hooks.internal/",
        "https://x.hooks.internal/",
        "https://11.0.0.1:1/",
        "http://127.0.0.1/",
    ):
        with pytest.raises(BadRequest):
            reach.check(url)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "0x7f.1"])
async def test_the_address_is_checked_where_it_is_connected_to(host: str) -> None:
    """Whatever a name resolves to by then, and however an address is written, a private one is not connected to."""
    async with Receiver() as receiver:
        for allow, kind in (([], "refused"), (["127.0.0.0/8", "::1"], "delivered")):
            sender = Sender(Reach(allow), 5.0, 4)
            await sender.open()
            try:
                url = URL(f"http://{host}:{receiver.port}/hook")
                outcome = await sender.post(url, b"{}", {"webhook-id": "evt_1"}, trusted=False)
            finally:
                await sender.close()
            assert outcome.kind == kind, outcome
            assert len(receiver.ids) == (kind == "delivered")
