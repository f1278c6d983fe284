"""What stands in a pack, some rows of each file."""

import json
import textwrap
from typing import Any

from ...artifacts.concepts import load_concept
from ...editing.errors import counted
from ...eval.concept import FILES

ROWS = 2
"""Rows of a file that are shown."""


def show(pack: str, rows: int = ROWS) -> dict[str, Any]:
    """A pack's description, what was made for it, and its first rows of each file.

    Raises:
        RequestError: There is no such pack.
        ConceptError: The pack has bad lines; all of them are listed.

    Example:
        >>> show("builtin:potions")["files"]["questions"]["rows"]
        800
    """
    concept = load_concept(pack)
    files = {}
    for name in FILES:
        held = getattr(concept, name)
        if held:
            first = [row.model_dump(mode="json", exclude_defaults=True) for row in held[:rows]]
            files[name] = {"rows": len(held), "first": first}
    about = concept.about.model_dump(mode="json", exclude_defaults=True)
    return {"name": concept.ref, "about": about, "made": list(concept.made), "files": files}


def text(shown: dict[str, Any], width: int | None) -> str:
    """The same for a terminal."""
    lines = [str(shown["name"])]
    for key, value in shown["about"].items():
        said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines.append(_line(f"  {key}: {said}", width))
    if shown["made"]:
        lines.append("\nmade, because the files do not hold it")
        lines += [_line(f"  {said}", width) for said in shown["made"]]
    for name, file in shown["files"].items():
        lines.append(f"\n{name}: {counted(file['rows'], 'row', 'rows')}")
        lines += [_line(f"  {json.dumps(row, ensure_ascii=False)}", width) for row in file["first"]]
    return "\n".join(lines)


def _line(said: str, width: int | None) -> str:
    """One line; a terminal gets as much of it as fits in three of its own."""
    return said if width is None else textwrap.shorten(said, 3 * width, placeholder=" …")
