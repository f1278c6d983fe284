"""Rows of a pack before they are divided into groups and written: what each says, and to which file it goes."""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...artifacts.sources.source import Source
from ...artifacts.sources.tables import SourceRow
from ...editing.errors import ConceptError, RequestError, counted
from ...eval.completed import asked
from ..data.schemas import Item, read_items, unread_columns
from .windows import WORDS, windows

FILES = {"text": "texts", "choices": "questions", "answer": "open_questions", "continuation": "passages"}
"""Where an item goes by its form; the file of a text depends on its split."""
GROUPED = ("questions", "open_questions", "forget")
"""Files whose rows have a group, in the order in which their subjects are divided."""


@dataclass(frozen=True)
class Entry:
    """One row to be."""

    file: str
    """Name of the pack's file, without its ending."""
    split: str
    id: str
    item: Item
    subject: str | None = None
    topic: str | None = None
    group: str | None = None

    @property
    def unit(self) -> str:
        """What must not stand in two groups."""
        return self.subject or f"row {self.id}"

    @property
    def words(self) -> str:
        """What makes two rows the same."""
        item = self.item
        parts = [item.text, item.prompt, item.answer, item.continuation, *sorted(item.choices)]
        return " ".join(" ".join(parts).casefold().split())


@dataclass(frozen=True)
class Reading:
    """Entries of one source, and what was left out of it, in words."""

    entries: tuple[Entry, ...]
    notes: tuple[str, ...]


def entries_of(
    source: Source,
    flag: str,
    split: str,
    *,
    most: int,
    mapping: dict[str, tuple[str, ...]] | None = None,
    prefix: str | None = None,
    topic: str | None = None,
    subject: Callable[[int], str | None] | None = None,
    group: str | None = None,
    forms: Sequence[str] = ("text", "choices", "answer", "continuation"),
    used: Sequence[str] = (),
    whole: bool = False,
) -> Reading:
    """What a source gives to a split of a pack.

    Args:
        flag: The option that named the source, for messages.
        most: Rows to make of it, at most; long texts make several.
        prefix: What ids begin with; the flag's name where none is given.
        subject: Subject by the row's number, in place of what the rows name.
        group: The group of all its rows, where it is fixed.
        forms: Forms of rows that fit.
        whole: Leave long texts as they are, because the source cut them itself.
        used: Columns that were read of the rows already, such as the one by which they were chosen.

    Raises:
        RequestError: Its rows are of a form that does not fit.
        ConceptError: A row is damaged.
    """
    notes, items = _read(source, mapping, used)
    entries, counts = list[Entry](), Counter[str]()
    for row, item in items:
        if item.group not in (None, "T", "V"):
            raise ConceptError(f"{row.place}: group is {item.group!r}; give T or V")
        if reason := _unusable(item):
            counts[reason] += 1
            continue
        if item.form not in forms:
            raise RequestError(_unfit(flag, source.shown, item.form, forms))
        counts["turns"] += item.turns > 1
        named = subject(row.number) if subject else item.subject or row.document
        identity = f"{prefix or flag}-{row.number + 1}"
        made = Entry(_file(item.form, split), split, identity, item, named, topic or item.topic, group or item.group)
        entries.append(made)
    if not whole:
        entries, cut = _cut(entries, source, most)
        notes += cut
    notes += [f"{source.shown}: {counted(counts[key], *words)}" for key, words in COUNTED.items() if counts[key]]
    if not entries:
        raise ConceptError(f"{source.shown} holds no row that can be used ({'; '.join(notes) or 'all are blank'})")
    return Reading(tuple(entries), tuple(notes))


ALIKE = ", because two choices are the same or there is only one"
TURNS = " several turns, of which the first was taken"
COUNTED = {
    "blank": ("blank row was left out", "blank rows were left out"),
    "alike": (f"question was left out{ALIKE}", f"questions were left out{ALIKE}"),
    "turns": (f"chat has{TURNS}", f"chats have{TURNS}"),
}
"""What is counted of a source's rows, in words for one and for several."""


def _unusable(item: Item) -> str | None:
    """Why a row is left out, as a key of ``COUNTED``."""
    if not (item.text or item.prompt).strip() or (item.form == "choices" and not all(item.choices)):
        return "blank"
    return "alike" if len(set(item.choices)) != len(item.choices) or len(item.choices) == 1 else None


def _read(
    source: Source, mapping: dict[str, tuple[str, ...]] | None, used: Sequence[str] = ()
) -> tuple[list[str], list[tuple[SourceRow, Item]]]:
    """What a source left out, with the columns that nothing reads, and its rows."""
    notes, read = list(source.notes), set(used)
    if len(source.rows) < source.total:
        notes.append(_drawn(source, len(source.rows), source.total, "rows"))
    items = read_items(source.rows, source.shown, mapping, read)
    return [*notes, *(f"{source.shown}: {line}" for line in unread_columns(source.rows, read))], items


def prompts_of(
    source: Source, flag: str, split: str, mapping: dict[str, tuple[str, ...]] | None = None, prefix: str | None = None
) -> Reading:
    """Prompts: of questions and chats what is asked, of texts the whole."""
    notes, items = _read(source, mapping)
    entries, blank = [], 0
    for row, item in items:
        text = (item.prompt or item.text).strip()
        blank += not text
        if text:
            one = replace(item, prompt=text, text="")
            entries.append(Entry("prompts", split, f"{prefix or flag}-{row.number + 1}", one, item.subject))
    if blank:
        notes.append(f"{source.shown}: {counted(blank, *COUNTED['blank'])}")
    if not entries:
        raise ConceptError(f"{source.shown} holds no prompt that is not blank; give another source")
    return Reading(tuple(entries), tuple(notes))


def _unfit(flag: str, name: str, form: str, forms: Sequence[str]) -> str:
    holds = {"text": "texts", "prompt": "questions without answers", "choices": "questions with choices",
             "answer": "questions with answers", "continuation": "passages"}  # fmt: skip
    wanted = " or ".join(holds[one] for one in forms)
    how = "name the answers, e.g. --map question=COLUMN,answer=COLUMN" if form == "prompt" else "give another source"
    return f"--{flag}: {name} holds {holds[form]}, and {wanted} are needed; {how}"


def _file(form: str, split: str) -> str:
    if form != "text":
        return FILES[form]
    return split if split in ("forget", "unseen") else "retain"


def _cut(entries: list[Entry], source: Source, most: int) -> tuple[list[Entry], list[str]]:
    """Long texts as windows, each with its document as subject; at most so many, from as many documents as there are."""
    found: list[list[Entry]] = []
    for entry in entries:
        parts = windows(entry.item.text) if entry.item.form == "text" else []
        if len(parts) < 2:
            found.append([entry])
            continue
        document = entry.subject or entry.id
        found.append(
            [replace(entry, id=f"{entry.id}-{n}", item=replace(entry.item, text=part), subject=document)
             for n, part in enumerate(parts, start=1)]
        )  # fmt: skip
    total = sum(map(len, found))
    documents = sum(len(parts) > 1 for parts in found)
    cuts = counted(documents, "long text was", "long texts were")
    pieces = f"{total - len(found) + documents} windows of about {WORDS} words"
    notes = [f"{source.shown}: {cuts} cut into {pieces}"] * bool(documents)
    if documents and len(found) == 1:
        # Windows of the only document are all that can be divided into groups.
        found = [[replace(entry, subject=None) for entry in found[0]]]
    if total > most:
        notes.append(_drawn(source, most, total, "windows"))
        found = _spread(found, most, source.name)
    return [entry for parts in found for entry in parts], notes


def _drawn(source: Source, count: int, total: int, what: str) -> str:
    was = "was" if count == 1 else "were"
    return f"{source.shown}: {count} of {total} {what} {was} drawn; --most N draws more"


def _spread(found: list[list[Entry]], most: int, name: str) -> list[list[Entry]]:
    """So many windows, one of each document before a second of any."""
    rng = random.Random(f"excise windows {name}")
    order = [rng.sample(range(len(parts)), k=len(parts)) for parts in found]
    turns = sorted(
        ((turn, rng.random(), document) for document, places in enumerate(order) for turn in range(len(places)))
    )[:most]
    drawn: list[set[int]] = [set() for _ in found]
    for turn, _, document in turns:
        drawn[document].add(order[document][turn])
    return [[parts[n] for n in sorted(places)] for parts, places in zip(found, drawn, strict=True)]


def without_repeats(entries: Iterable[Entry]) -> tuple[list[Entry], list[str]]:
    """Entries without those that say the same as an earlier one; what is to be forgotten goes before what stays."""
    seen: dict[tuple[str, str], str] = {}
    kept, counts = list[Entry](), Counter[tuple[str, str]]()
    for entry in sorted(entries, key=lambda one: one.split != "forget"):
        # Texts that stay are compared with texts to forget, so both have one kind.
        kind = "texts" if entry.file in ("forget", "retain", "unseen") else entry.file
        first = seen.get((kind, entry.words))
        if first is None:
            seen[kind, entry.words] = entry.split
            kept.append(entry)
        else:
            other = "an earlier one" if first == entry.split else f"a {first} row"
            counts[entry.split, other] += 1
    return kept, [
        counted(count, f"{split} row with the words of {other} was", f"{split} rows with the words of {other} were")
        for (split, other), count in counts.items()
    ]


def grouped(entries: Sequence[Entry], held_out: float) -> list[Entry]:
    """Entries with a group. No subject stands in both, and in each file a share of the subjects is held out.

    Subjects are taken in the order of their hashes, so that the same data are always divided alike.

    Raises:
        ConceptError: Nothing to forget is left for one of the groups, or a subject is given to both.
    """
    groups: dict[tuple[str, str], str] = {}
    for entry in entries:
        if entry.group and groups.setdefault((entry.split, entry.unit), entry.group) != entry.group:
            raise ConceptError(f"subject {entry.unit!r} is in both groups; give all its rows T or V")
    files = {(entry.split, entry.file) for entry in entries if entry.file in GROUPED}
    for split, file in sorted(files, key=lambda key: (GROUPED.index(key[1]), key[0])):
        units = {entry.unit for entry in entries if (entry.split, entry.file) == (split, file)}
        free = sorted((unit for unit in units if (split, unit) not in groups), key=_hash)
        held = sum(groups.get((split, unit)) == "V" for unit in units)
        # Both groups get one where there are two.
        wanted = min(max(round(held_out * len(units)), 1), max(len(units) - 1, 1)) - held
        for place, unit in enumerate(free):
            groups[split, unit] = "V" if place < wanted else "T"
    found = [replace(entry, group=groups.get((entry.split, entry.unit))) for entry in entries]
    missing = {"T", "V"} - {entry.group for entry in found if entry.split == "forget" and entry.file in GROUPED}
    if missing:
        count = len({entry.unit for entry in found if entry.split == "forget" and entry.file in GROUPED})
        if count > 1:
            raise ConceptError(
                f"every row to forget is given group {min({'T', 'V'} - missing)}; T is trained on and V measured, so give"
                " some rows the other group, or leave out the column, and they are divided"
            )
        raise ConceptError(
            f"what is to be forgotten has {counted(count, 'subject', 'subjects')}, and none for group {min(missing)}; T is"
            " trained on and V measured, so give rows on at least two subjects, or a column group with T and V"
        )
    return found


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def written_row(entry: Entry) -> dict[str, Any]:
    """The line of a pack's file."""
    row = {key: value for key, value in ROWS[entry.file](entry).items() if value not in (None, ())}
    return {"id": entry.id, **row}


def _question(entry: Entry) -> dict[str, Any]:
    choices = list(entry.item.choices)
    if not entry.item.in_order:
        random.Random(f"excise order {entry.id}").shuffle(choices)
    about = {"split": entry.split, "group": entry.group, "topic": entry.topic, "subject": entry.subject}
    answer = choices.index(entry.item.answer)
    return {**about, "prompt": asked(entry.item.prompt), "choices": choices, "answer": answer}


def _open_question(entry: Entry) -> dict[str, Any]:
    item = entry.item
    return {
        "split": entry.split,
        "group": entry.group,
        "topic": entry.topic,
        "subject": entry.subject,
        "prompt": item.prompt,
        "answer": item.answer,
        "other_answers": _others_of(item),
        "paraphrase": item.paraphrase,
        "paraphrased_answer": item.paraphrased_answer,
        "perturbed_answers": tuple(text for text in item.wrong if text.strip()),
        "level": item.level,
    }


def _prompt(entry: Entry) -> dict[str, Any]:
    item = entry.item
    about = {"split": entry.split, "prompt": item.prompt, "subject": entry.subject}
    return {**about, "answer": item.answer or None, "other_answers": _others_of(item), "choices": item.choices}


def _others_of(item: Item) -> tuple[str, ...]:
    """Further right answers that differ from the first and from each other."""
    texts = {" ".join(text.casefold().split()): text for text in reversed(item.other_answers) if text.strip()}
    texts.pop(" ".join(item.answer.casefold().split()), None)
    return tuple(reversed(texts.values()))


ROWS: dict[str, Callable[[Entry], dict[str, Any]]] = {
    "forget": lambda entry: {"text": entry.item.text, "group": entry.group, "subject": entry.subject},
    "retain": lambda entry: {"text": entry.item.text, "topic": entry.topic, "subject": entry.subject},
    "questions": _question,
    "open_questions": _open_question,
    "passages": lambda entry: {
        "split": entry.split, "subject": entry.subject, "prompt": entry.item.prompt,
        "continuation": entry.item.continuation,
    },
    "shots": lambda entry: {"split": entry.split, "prompt": entry.item.prompt, "answer": entry.item.answer},
    "unseen": lambda entry: {"text": entry.item.text, "subject": entry.subject},
    "members": lambda entry: {"text": entry.item.text, "subject": entry.subject},
    "prompts": _prompt,
    "contrast": lambda entry: {"positive": entry.item.text, "negative": entry.item.prompt},
}  # fmt: skip
"""Keys of a line by file."""
