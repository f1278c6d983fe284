"""Directions to look through, as one page that opens offline and treats texts as data."""

from pathlib import Path
from typing import Any

from .pages import render


def write_report(path: Path, about: dict[str, Any]) -> None:
    """Write the page of an inspection."""
    path.write_text(render("directions.html.j2", about=about, directions=about["directions"]), encoding="utf-8")
