"""The kinds of personal data that are known by name, and what tells them from other texts of the same shape. Pure."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise

from llmstream.patterns.scanner import Check, Pattern

_GAP = r"[ \u00a0\u202f-]?"
"""What may stand between two digits or groups of them."""
_NEVER = r"""\s@<>()\[\],;:"'`=\\/|{}\u00ab\u00bb\u2018-\u201e"""
"""Characters that stand around addresses, and not in them."""

EMAIL = rf"[^{_NEVER}]{{1,64}}@(?:[^{_NEVER}.!?]{{1,63}}\.){{1,5}}[A-Za-z][A-Za-z0-9-]{{1,23}}"
INTERNATIONAL = r"\+[1-9](?:[ ./()\u00a0\u202f-]{0,2}[0-9]){6,14}\b"
NORTH_AMERICAN = r"(?:\([0-9]{3}\)[ .\u00a0-]?|\b[0-9]{3}[ .\u00a0-])[0-9]{3}[ .\u00a0-][0-9]{4}\b"
NATIONAL = r"\b0[0-9]{1,4}[ /.\u00a0-][0-9]{3,4}(?:[ .\u00a0-]?[0-9]{2,4}){1,3}\b"
PHONE = f"{INTERNATIONAL}|{NORTH_AMERICAN}|{NATIONAL}"
CARD = rf"\b[2-6](?:{_GAP}[0-9]){{12,18}}\b"
IBAN = rf"\b[A-Za-z]{{2}}[0-9]{{2}}(?:{_GAP}[A-Za-z0-9]){{11,30}}\b"
IP = r"\b[0-9]{1,3}(?:\.[0-9]{1,3}){3}\b|\b(?:[0-9A-Fa-f]{1,4}::?){1,7}[0-9A-Fa-f]{1,4}\b"
SSN = r"\b[0-9]{3}[ \u00a0-][0-9]{2}[ \u00a0-][0-9]{4}\b"


def longest_prefix(holds: Callable[[str], bool], sizes: range) -> Check:
    """A check for letters and digits in groups: the longest beginning that ends with a group, has so many of them and
    passes ``holds``."""

    def check(text: str) -> int:
        for end in _ends(text):
            bare = re.sub(r"[^A-Za-z0-9]", "", text[:end])
            if len(bare) in sizes and holds(bare):
                return end
        return 0

    return check


def _ends(text: str) -> Iterator[int]:
    """Where groups end, the last one first."""
    yield len(text)
    for (at, this), (_, following) in reversed(list(pairwise(enumerate(text)))):
        if this.isalnum() and not following.isalnum():
            yield at + 1


def luhn(digits: str) -> bool:
    """Whether the check digit of a card's number is right."""
    doubled = [int(digit) * (2 if at % 2 else 1) for at, digit in enumerate(reversed(digits))]
    return len(set(digits)) > 1 and sum(each - 9 if each > 9 else each for each in doubled) % 10 == 0


def mod97(iban: str) -> bool:
    """Whether the check digits of an IBAN are right (ISO 13616)."""
    return int("".join(str(int(each, 36)) for each in iban[4:] + iban[:4])) % 97 == 1


def _ip(text: str) -> int:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return 0
    if address.version == 4:
        return len(text)
    # ``std::dead::beef`` and the like have the form of an address, and are none.
    first = text.partition(":")[0]
    groups = sum(map(bool, text.split(":")))
    return len(text) if groups > 3 or (len(first) > 2 and any(map(str.isdigit, first))) else 0


def _ssn(text: str) -> int:
    area, group, serial = text[:3], text[4:6], text[7:]
    valid = area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"
    return len(text) if valid else 0


_KNOWN: dict[str, tuple[str, Check]] = {
    "email": (EMAIL, len),
    "phone": (PHONE, len),
    "card": (CARD, longest_prefix(luhn, range(13, 20))),
    "iban": (IBAN, longest_prefix(mod97, range(15, 35))),
    "ip": (IP, _ip),
    "ssn": (SSN, _ssn),
}
KNOWN = tuple(_KNOWN)


@cache
def known(name: str) -> Pattern:
    """The pattern of this name."""
    return Pattern(name, *_KNOWN[name])
