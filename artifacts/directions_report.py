"""Directions to look through, as one page that opens offline and treats texts as data."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .report import clean


def write_report(path: Path, about: dict[str, Any]) -> None:
    """Write the page of an inspection."""
    environment = Environment(
        loader=PackageLoader(__package__, "templates"), undefined=StrictUndefined, autoescape=True
    )
    text = environment.get_template("directions.html.j2").render(
        about=about, directions=about["directions"], clean=clean
    )
    path.write_text(text, encoding="utf-8")
