"""What is known by name: found in the forms that people write, and told from what only looks like it."""

from __future__ import annotations

import pytest

from llmstream.patterns.known import KNOWN, known
from llmstream.patterns.scanner import Scanner

SCANNER = Scanner([known(name) for name in KNOWN])

FOUND = {
    "email": [
        "bob@example.com",
        "first.last+tag@mail.example.co.uk",
        "josé@exämple.de",
        "a_b-c%d@x-y.museum",
        "x@xn--bcher-kva.example",
    ],
    "phone": [
        "+49 170 1234567",
        "+14155550123",
        "+1 (415) 555-0123",
        "+44 20 7946 0958",
        "(415) 555-0123",
        "415-555-0123",
        "415.555.0123",
        "030 1234567",
        "0170/1234567",
    ],
    "card": [
        "4111111111111111",
        "4111 1111 1111 1111",
        "4111-1111-1111-1111",
        "378282246310005",
        "6011 1111 1111 1117",
    ],
    "iban": [
        "DE89370400440532013000",
        "DE89 3704 0044 0532 0130 00",
        "GB82 WEST 1234 5698 7654 32",
        "gb82west12345698765432",
        "NO93 8601 1117 947",
        "MT84MALT011000012345MTLCAST001S",
    ],
    "ip": ["192.168.0.1", "8.8.8.8", "255.255.255.255", "2001:db8::8a2e:370:7334", "fe80::1", "2001:db8:1:2:3:4:5:6"],
    "ssn": ["123-45-6789", "123 45 6789"],
}
AROUND = ["{}", "write {}, or call", "({})", "it is {}.", "x\n{}\ny", "«{}»", '"{}"', "12 {} 99", "to:{}; END"]
NOTHING = [
    "4111 1111 1111 1112",
    "GB82 WEST 1234 5698 7654 33",
    "300.1.1.1",
    "1.2.3",
    "000-12-3456",
    "666-12-3456",
    "900-12-3456",
    "123-00-6789",
    "123-45-0000",
    "12:30:45",
    "std::dead::beef",
    "a::b",
    "2024-01-15T12:30:45.123Z",
    "1700000000000",
    "3.14159265358979",
    "550e8400-e29b-41d4-a716-446655440000",
    "user@localhost",
    "@example.com",
    "a@b",
    "1234567890123456789012345678",
    "version 10.2, page 415",
]


def found(text: str) -> list[tuple[str, str]]:
    return [(each.name, text[each.start : each.end]) for each in SCANNER.scan(text)[0]]


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_is_found(name: str, around: str) -> None:
    """Every kind is found in every form and exactly, whatever stands around it."""
    if name == "phone":  # digits beside it may belong to it
        around = around.replace("12 {} 99", "no. {} (at 9)")
    for text in FOUND[name]:
        assert found(around.format(text)) == [(name, text)], around.format(text)


@pytest.mark.parametrize("text", NOTHING)
def test_what_only_looks_like_it_stays(text: str) -> None:
    """Wrong check digits, impossible numbers, times, versions and identifiers are left alone."""
    assert found(text) == []


def test_the_leftmost_and_longest_counts() -> None:
    """Where two kinds overlap, the one that begins first counts, then the longer one."""
    assert found("bob@10.example.com 10.0.0.1") == [("email", "bob@10.example.com"), ("ip", "10.0.0.1")]
    assert found("4111 1111 1111 1111") == [("card", "4111 1111 1111 1111")]
