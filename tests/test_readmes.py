"""Every room has a page that names its files, and every link of a page leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = sorted({path.parent for top in ("actors", "cluster", "pipeline") for path in (ROOT / top).rglob("__init__.py")})
PAGES = [path for path in ROOT.rglob("*.md") if not {".venv", "node_modules"} & set(path.parts)]


def page_of(room: Path) -> Path:
    """The README of a room, or of the one that it is a part of."""
    return room / "README.md" if (room / "README.md").is_file() else page_of(room.parent)


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: str(room.relative_to(ROOT)))
def test_a_room_s_page_names_its_files(room: Path) -> None:
    text = page_of(room).read_text()
    files = [path for path in room.glob("*.py") if path.name != "__init__.py"]
    assert [path.name for path in files if f"`{path.name}" not in text and f"`{path.stem}" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target
