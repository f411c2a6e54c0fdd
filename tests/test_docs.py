"""The pages of the documentation are kept true: what they quote is said, what they link to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_messages_that_are_explained_are_those_of_the_code() -> None:
    """A quote leaves out what differs from case to case: N, NAME and dots stand for anything."""
    code = "".join(file.read_text() for file in sorted((ROOT / "ogls").rglob("*.py")))
    code = re.sub(r"\"\s*\n\s*f?\"", "", code)  # a message that goes on in the next line
    terms = re.findall(r"^(`.*`)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    quotes = [quote for term in terms for quote in re.findall(r"`([^`]*)`", term)]
    assert len(quotes) >= 10
    for quote in quotes:
        for part in re.split(r"\bN\b|\.\.\.", quote):
            assert part.strip() in code, f"{part.strip()!r} of {quote!r} is in no message"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://", "#")) and "_generated/" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), target
