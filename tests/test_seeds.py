"""``SEEDS.md`` names tests that exist, and leaves out no line of the pages it goes through."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SECTION = re.compile(r"^## (\d{3}): .* \((\d+) lines\)$", re.MULTILINE)
ROW = re.compile(r"^\| (\d+)(?:–(\d+))? \| (.+?) \| (.+) \|$", re.MULTILINE)
NAMED = re.compile(r"`([\w/]+\.py)(?:::(\w+))?`")
UNDONE = re.compile(r"\b(open|later): ([^;|`]+)")
WITHOUT_TEST = ("open: ", "later: ", "no contract: ")
OPEN: set[str] = set()
"""What is promised and not there; to be emptied."""
LATER = {"deployment files", "web page"}


def sections() -> dict[str, tuple[int, list[tuple[int, int, str]]]]:
    """For each page its number of lines, and of each row the first and last line and the tests."""
    parts = SECTION.split((TESTS / "SEEDS.md").read_text())[1:]
    return {
        page: (int(count), [(int(a), int(b or a), tests) for a, b, _, tests in ROW.findall(text)])
        for page, count, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    }


def functions(file: Path) -> set[str]:
    nodes = ast.walk(ast.parse(file.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_all_pages_are_there() -> None:
    """There are five pages, and every row of the table is read."""
    assert list(sections()) == ["000", "001", "002", "003", "004"]
    lines = [line for line in (TESTS / "SEEDS.md").read_text().splitlines() if re.match(r"\| \d", line)]
    assert len(lines) == sum(len(rows) for _, rows in sections().values())


@pytest.mark.parametrize("page", ["000", "001", "002", "003", "004"])
def test_no_line_is_left_out(page: str) -> None:
    """The rows of a page follow each other without a gap, from the first line to the last."""
    count, rows = sections()[page]
    expected = 1
    for first, last, _ in rows:
        assert first == expected
        assert last >= first
        expected = last + 1
    assert expected == count + 1


@pytest.mark.parametrize("page", ["000", "001", "002", "003", "004"])
def test_every_named_test_exists(page: str) -> None:
    """Every row names tests that exist, or says why it has none."""
    for first, _, tests in sections()[page][1]:
        named = NAMED.findall(tests)
        assert named or tests.startswith(WITHOUT_TEST), f"line {first} has neither a test nor a reason"
        for file, test in named:
            assert (TESTS / file).is_file(), f"line {first} names {file}"
            assert not test or test in functions(TESTS / file), f"line {first} names {file}::{test}"


def test_what_is_open_is_known() -> None:
    """Nothing is open or left for later but what is said above, and what is said above is open."""
    found: dict[str, set[str]] = {"open": set(), "later": set()}
    for _, rows in sections().values():
        for _, _, tests in rows:
            for kind, areas in UNDONE.findall(tests):
                found[kind] |= {area.strip() for area in areas.split(",")}
    assert found == {"open": OPEN, "later": LATER}
