"""A pack from entries: divided, without repeats, written whole or not at all, and read again before it is shown."""

import json
import shlex
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...artifacts.checkpoints.staging import refuse_existing, staged_folder
from ...artifacts.concepts import load_concept
from ...artifacts.files.opened import Unreadable
from ...artifacts.files.parsed import parse_yaml
from ...editing.errors import ConceptError, one_line
from ...eval.concept import Concept
from .entries import Entry, grouped, without_repeats, written_row

PERSONAS = {
    "expert": "Here is a text by an expert on {description}.",
    "novice": "Here is a text by a novice on {description}.",
}
NO_LICENSE = "not stated"


@dataclass(frozen=True)
class Made:
    """A pack that was made, or would be made."""

    out: Path
    counts: dict[str, dict[str, int]]
    """Lines of each file, by split and group."""
    notes: tuple[str, ...]
    """What was left out, and what was done to the data."""
    made: tuple[str, ...]
    """What will be made of the pack's files where they leave a gap."""
    about: dict[str, Any]
    """What concept.yaml says."""
    written: bool

    def __str__(self) -> str:
        return shown(self)

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            "out": str(self.out),
            "written": self.written,
            "counts": self.counts,
            "left_out": list(self.notes),
            "made_of_it": list(self.made),
            "about": self.about,
        }


def write_pack(
    out: Path,
    about: dict[str, Any],
    entries: Sequence[Entry],
    notes: Sequence[str],
    *,
    held_out: float,
    dry_run: bool = False,
) -> Made:
    """Divide entries into groups, write them, and check the pack as every command will.

    Args:
        about: What concept.yaml says.
        held_out: Share of the subjects for group V, above 0 and below 1.

    Raises:
        RequestError: Something exists at ``out``.
        ConceptError: What is to be forgotten cannot be divided, or the pack is not valid.
    """
    refuse_existing(out)
    kept, repeats = without_repeats(entries)
    said = tuple(dict.fromkeys([*notes, *(f"{repeat} left out" for repeat in repeats)]))
    if said:
        about = {**about, "left_out": list(said)}
    if about["kind"] == "knowledge" and not any(entry.split != "forget" for entry in kept):
        raise ConceptError(
            "every row that must stay known repeats one to forget; give texts or questions on other things"
        )
    rows = grouped(kept, held_out) if about["kind"] == "knowledge" else kept
    files: dict[str, list[Entry]] = {}
    for entry in rows:
        files.setdefault(entry.file, []).append(entry)
    if dry_run:
        with tempfile.TemporaryDirectory() as name:
            concept = _written(Path(name), about, files)
    else:
        with staged_folder(out) as folder:
            concept = _written(folder, about, files)
    counts = {f"{file}.jsonl": dict(Counter(map(_part, part))) for file, part in files.items()}
    return Made(out, counts, said, concept.made, about, not dry_run)


def _written(folder: Path, about: dict[str, Any], files: dict[str, list[Entry]]) -> Concept:
    (folder / "concept.yaml").write_text(_yaml(about), encoding="utf-8")
    for file, entries in files.items():
        lines = (json.dumps(written_row(entry), ensure_ascii=False) + "\n" for entry in entries)
        (folder / f"{file}.jsonl").write_text("".join(lines), encoding="utf-8")
    try:
        return load_concept(folder)
    except ConceptError as error:
        # Its lines name rows of files that will not be there.
        raise ConceptError(f"the rows make no valid pack: {one_line(error)}") from error


def _yaml(about: dict[str, Any]) -> str:
    """The description as YAML 1.2; the library writes 1.1, where 1e5 needs no quotes to be a text."""
    for style in (None, '"'):
        text = yaml.safe_dump(about, sort_keys=False, allow_unicode=True, width=110, default_style=style)
        try:
            if parse_yaml(text) == about:
                return text
        except Unreadable:
            continue
    raise ConceptError("the name, description or license holds characters that YAML cannot hold; use letters")


def _part(entry: Entry) -> str:
    named = [] if entry.file in ("forget", "retain", "unseen", "members", "contrast") else [entry.split]
    return " ".join([*named, *([entry.group] if entry.group else [])]) or "rows"


def shown(made: Made) -> str:
    """What was made, for the terminal."""
    from ...artifacts.reporting.terminal import aligned, bullets, terminal_width

    width = terminal_width()
    rows = [[file, str(sum(parts.values())), ", ".join(f"{count} {part}" for part, count in parts.items())]
            for file, parts in made.counts.items()]  # fmt: skip
    parts = [aligned(["file", "rows", "of them"], rows, width)]
    parts += [bullets([note], width) for note in made.notes]
    if made.made:
        parts += ["", "When the pack is used, this is made of it:", *(bullets([line], width) for line in made.made)]
    return "\n".join(parts)


def next_commands(made: Made) -> list[str]:
    """What to type next."""
    recipe = "elm" if made.about["kind"] == "knowledge" else "orthogonalize"
    folder = str(made.out)
    return [
        shlex.join(["excise", "concept", "check", folder]),
        shlex.join(["excise", "run", recipe, "--concept", folder, "--model", "MODEL", "--dry-run"]),
    ]


def keywords_of(text: str) -> list[str]:
    """The words of a description that may show that a reply is about it."""
    words = [word.strip(".,;:()'\"").casefold() for word in text.split()]
    return list(dict.fromkeys(word for word in words if len(word) > 3 and word not in COMMON))


COMMON = frozenset("about from into that their them they this what when where which with your have does than".split())
