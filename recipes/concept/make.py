"""A concept pack from what people have: texts, questions with or without choices, lists of prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...artifacts.checkpoints.staging import refuse_existing
from ...artifacts.events import Events
from ...artifacts.sources.source import MOST, Source, read_source
from ...editing.errors import ConceptError, RequestError, counted
from ..data.schemas import Item, parse_map
from .entries import Entry, Reading, entries_of, prompts_of
from .names import with_subjects
from .pack import NO_LICENSE, PERSONAS, Made, keywords_of, write_pack

QUESTIONS = ("choices", "answer")


@dataclass(frozen=True)
class Role:
    """What an option's rows are for."""

    split: str
    forms: tuple[str, ...] = ("text", "choices", "answer", "continuation")
    """Forms of rows that fit; none for prompts."""
    topic: str | None = None


ROLES: dict[str, Role] = {
    "forget": Role("forget"),
    "questions": Role("forget", QUESTIONS),
    "neighbour": Role("neighbour", ("text", *QUESTIONS), topic="neighbour"),
    "retain": Role("retain"),
    "retain-questions": Role("retain", QUESTIONS),
    "unseen": Role("unseen", ("text",)),
    "prompts": Role("concept", ()),
    "positive": Role("positive", ()),
    "negative": Role("negative", ()),
}
"""The options that name sources."""


@dataclass(frozen=True)
class MakeRequest:
    """What a pack is to be made of."""

    out: Path
    sources: dict[str, tuple[str, ...]]
    """Sources by role, a key of ``ROLES``."""
    maps: tuple[str, ...] = ()
    """``[ROLE:]FIELD=COLUMN,...``"""
    name: str | None = None
    description: str | None = None
    license: str | None = None
    keywords: tuple[str, ...] = ()
    held_out: float = 0.5
    most: int = MOST

    @property
    def kind(self) -> str:
        """``knowledge`` or ``behaviour``."""
        return "behaviour" if {"positive", "negative"} & self.sources.keys() else "knowledge"

    def check(self) -> None:
        """What is wrong before anything is read.

        Raises:
            RequestError: A source is missing, or does not belong to the others.
        """
        refuse_existing(self.out)
        given = self.sources.keys()
        if self.kind == "behaviour":
            if missing := {"positive", "negative"} - given:
                raise RequestError(
                    f"--{min(missing)} is missing; a behaviour is told by two lists, of prompts that show it and of others"
                )
            if more := given & {"forget", "questions", "neighbour", "unseen"}:
                raise RequestError(
                    f"--{min(more)} does not belong to a behaviour; leave it out, or leave out --positive and --negative"
                )
        elif not given & {"forget", "questions"}:
            raise RequestError(
                "nothing says what to forget; give --forget SOURCE, or for a behaviour --positive and --negative"
            )
        elif not given & {"retain", "retain-questions", "neighbour"}:
            raise RequestError(
                "nothing says what must stay known; give --retain SOURCE, e.g. general texts of the same kind"
            )
        check_held_out(self.held_out)


def check_held_out(share: float) -> None:
    """Raise a ``RequestError`` for a share that leaves one of the groups empty."""
    if not 0 < share < 1:
        raise RequestError(f"--held-out {share} is not above 0 and below 1; it is the share of group V")


def make(request: MakeRequest, events: Events, *, dry_run: bool = False) -> Made:
    """Read the sources and write the pack, whole or not at all.

    Raises:
        RequestError: The request is wrong, or the Hub refuses.
        ConceptError: A source is damaged or does not fit; the message names the line.

    Example:
        >>> make(MakeRequest(Path("pack"), {"forget": ("a.txt",), "retain": ("b.txt",)}), Events()).counts
        {'forget.jsonl': {'T': 10, 'V': 10}, 'retain.jsonl': {'rows': 20}}
    """
    request.check()
    maps = _maps(request)
    entries, notes, sources, used = list[Entry](), list[str](), list[Source](), set[int]()
    for name, role in ROLES.items():
        for number, ref in enumerate(request.sources.get(name, ())):
            with events.stage(f"reading {ref}") as stage:
                source = read_source(ref, request.most, advance=stage.advance)
            mapping = _map_for(maps, name, source, used)
            prefix = name if number == 0 else f"{name}{number + 1}"
            read = _read(source, name, role, request.most, mapping, prefix)
            entries += read.entries
            notes += read.notes
            sources.append(source)
    if unused := [text for n, (_, text, _) in enumerate(maps) if n not in used]:
        raise RequestError(f"--map {unused[0]}: no source has these columns; it needs all of them in one source")
    if request.kind == "behaviour":
        entries, more = _pairs(entries)
    else:
        entries, more = with_subjects(entries)
    notes += more
    about = _about(request, sources)
    if about["license"] == NO_LICENSE:
        notes.append("no source states a license, so concept.yaml says that; --license NAME states it")
    return write_pack(request.out, about, entries, notes, held_out=request.held_out, dry_run=dry_run)


def _read(
    source: Source, name: str, role: Role, most: int, mapping: dict[str, tuple[str, ...]] | None, prefix: str
) -> Reading:
    if not role.forms:
        return prompts_of(source, name, role.split, mapping, prefix)
    return entries_of(
        source, name, role.split, most=most, mapping=mapping, prefix=prefix, topic=role.topic, forms=role.forms
    )


Maps = list[tuple[str | None, str, dict[str, tuple[str, ...]]]]
"""Role or None, the text as it was given, and columns by field."""


def _maps(request: MakeRequest) -> Maps:
    found: Maps = []
    for text in request.maps:
        role, colon, rest = text.partition(":")
        if colon and "=" not in role:
            if role not in request.sources:
                raise RequestError(f"--map {text}: there is no --{role} here; sources: {', '.join(request.sources)}")
            found.append((role, text, parse_map(rest)))
        else:
            found.append((None, text, parse_map(text)))
    return found


def _map_for(maps: Maps, role: str, source: Source, used: set[int]) -> dict[str, tuple[str, ...]] | None:
    """The map of a source: that of its role, or the first one whose columns it has."""
    columns = source.rows[0].columns
    for number, (wanted, _, mapping) in enumerate(maps):
        if wanted == role or (wanted is None and all(name in columns for names in mapping.values() for name in names)):
            used.add(number)
            return mapping
    return None


def _pairs(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """Contrast pairs: the first prompt that shows the behaviour beside the first that does not, and so on."""
    sides = {
        split: _distinct([entry for entry in entries if entry.split == split]) for split in ("positive", "negative")
    }
    shown = {entry.item.prompt for entry in sides["positive"]}
    both = [entry for entry in sides["negative"] if entry.item.prompt in shown]
    if both:
        raise ConceptError(
            f"{counted(len(both), 'prompt stands', 'prompts stand')} in both lists, e.g. {both[0].item.prompt[:60]!r};"
            " give what stands in both in one of them alone"
        )
    pairs = list(zip(sides["positive"], sides["negative"], strict=False))
    given = [sum(entry.split == split for entry in entries) for split in sides]
    notes = []
    for n, (split, side) in enumerate(sides.items()):
        one, many = f"{split} prompt was left out, because", f"{split} prompts were left out, because"
        if repeated := given[n] - len(side):
            said = counted(repeated, f"{one} it repeats", f"{many} each repeats")
            notes.append(f"{said} an earlier one")
        if more := len(side) - len(pairs):
            notes.append(f"{counted(more, one, many)} the other list is shorter")
    made = [Entry("contrast", "pair", f"pair-{n}", Item(text=one.item.prompt, prompt=other.item.prompt))
            for n, (one, other) in enumerate(pairs, start=1)]  # fmt: skip
    if len(made) < FEWEST_PAIRS:
        raise ConceptError(
            f"the two lists make {counted(len(made), 'pair', 'pairs')}; give at least {FEWEST_PAIRS}, better a hundred"
        )
    rest = [entry for entry in entries if entry.split not in sides]
    # Groups of questions beside a behaviour are never trained on.
    return [*made, *(replace(entry, group=entry.group or "V") for entry in rest)], notes


FEWEST_PAIRS = 8
"""A quarter of them is kept apart to measure on."""


def _distinct(entries: Sequence[Entry]) -> list[Entry]:
    return list({" ".join(entry.item.prompt.casefold().split()): entry for entry in reversed(entries)}.values())[::-1]


def _about(request: MakeRequest, sources: Sequence[Source]) -> dict[str, Any]:
    name = request.name or request.out.resolve().name
    description = request.description or name.replace("-", " ").replace("_", " ")
    stated = dict.fromkeys(source.license for source in sources if source.license)
    about: dict[str, Any] = {
        "name": name,
        "kind": request.kind,
        "description": description,
        "keywords": list(request.keywords) or keywords_of(description),
        "license": request.license or ", ".join(stated) or NO_LICENSE,
        "source": "; ".join(dict.fromkeys(_source(source) for source in sources)),
    }
    return about | ({"personas": PERSONAS} if request.kind == "knowledge" else {})


def _source(source: Source) -> str:
    return f"{source.name} (sha256 {source.sha256[:16]})" if source.sha256 else source.name
