"""Concept packs: what to edit and how to measure it, validated completely before any model is loaded.

Example:
    >>> concept = load_concept("builtin:potions")
    >>> len(concept.questions)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from ..editing.errors import ConceptError, RequestError, counted, nearest, one_line
from ..eval.completed import completed, windowed
from ..eval.concept import (
    Concept,
    ContrastPair,
    Description,
    ForgetText,
    MemberText,
    OpenQuestion,
    Passage,
    Prompt,
    Question,
    RetainText,
    Row,
    Shot,
    TrainingRow,
    UnseenText,
)
from .events import late_stage
from .files.opened import Unreadable, located, sha256_of
from .files.parsed import parse_json, read_lines, read_yaml

BUILTIN = Path(__file__).parent / "builtin" / "concepts"
_FILES: dict[str, type[Row] | type[TrainingRow]] = {
    "forget": ForgetText,
    "retain": RetainText,
    "questions": Question,
    "prompts": Prompt,
    "contrast": ContrastPair,
    "train": TrainingRow,
    "open_questions": OpenQuestion,
    "passages": Passage,
    "shots": Shot,
    "unseen": UnseenText,
    "members": MemberText,
}
_ONE_OF = {
    "knowledge": ("forget", "questions", "open_questions"),
    "behaviour": ("contrast",),
    "task": ("questions",),
}
"""A pack of each kind says what to edit by at least one of these files; what else it needs depends on its use."""


def builtin_concepts() -> list[str]:
    """Names of the concepts in the package."""
    return sorted(path.name for path in BUILTIN.glob("*") if (path / "concept.yaml").exists())


def describe_concept(name: str) -> Description:
    """What a built-in concept says of itself, without reading its texts.

    Raises:
        ConceptError: Its description is damaged.
    """
    problems: list[str] = []
    about = _description(BUILTIN / name / "concept.yaml", problems)
    if about is None:
        raise ConceptError(f"concept builtin:{name} is damaged ({problems[0]}); install excise again")
    return about


_HELD: ContextVar[dict[str, Concept] | None] = ContextVar("_HELD", default=None)


@contextmanager
def read_once() -> Iterator[None]:
    """Within this context every pack is read once, however often it is loaded: for what asks many things about one."""
    token = _HELD.set({})
    try:
        yield
    finally:
        _HELD.reset(token)


def load_concept(ref: str | Path) -> Concept:
    """Read and validate a concept pack.

    Args:
        ref: ``builtin:NAME``, or the pack's folder.

    Returns:
        The pack's texts, questions and prompts.

    Raises:
        RequestError: Nothing has that name.
        ConceptError: Bad lines; all of them are listed with file and line number.

    Example:
        >>> import excise
        >>> concept = excise.load_concept("builtin:potions")
        >>> concept.about.kind, len(concept.questions)
        ('knowledge', 800)
    """
    held, named = _HELD.get(), str(ref)
    if held is None:
        return _loaded(named)
    if named not in held:
        held[named] = _loaded(named)
    return held[named]


def _loaded(ref: str) -> Concept:
    if ref.startswith("builtin:"):
        name = ref.removeprefix("builtin:")
        names = builtin_concepts()
        if name not in names:
            raise RequestError(f"no built-in concept {name!r}{nearest(name, names)}; concepts: {', '.join(names)}")
        folder = BUILTIN / name
    else:
        folder = Path(ref)
        if not folder.is_dir():
            known = [f"builtin:{name}" for name in builtin_concepts()]
            raise RequestError(
                f"{ref} is not a folder{nearest(ref, known)}; give a concept folder or one of {', '.join(known)}; excise"
                " concept make makes a folder of files or of data sets on the Hub"
            )
        # The name alone stands in records, because a path may be private.
        ref = folder.resolve().name
    return _read(folder, ref)


def _read(folder: Path, ref: str) -> Concept:
    problems: list[str] = []
    about = _description(folder / "concept.yaml", problems)
    size = sum(path.stat().st_size for name in _FILES if (path := folder / f"{name}.jsonl").is_file())
    with late_stage(f"read concept {about.name if about else ref}", size) as advance:
        return _whole(folder, ref, about, problems, advance)


def _whole(
    folder: Path, ref: str, about: Description | None, problems: list[str], advance: Callable[[int], None]
) -> Concept:
    """The pack of a folder, with what was made of it; ``advance`` counts bytes."""
    rows: dict[str, tuple[Any, ...]] = {}
    made: tuple[str, ...] = ()
    for name, kind in _FILES.items():
        path = folder / f"{name}.jsonl"
        rows[name] = ()
        if path.exists():
            before = len(problems)
            if kind in (ForgetText, RetainText):
                rows[name], drawn = windowed(
                    cast(Iterator[RetainText], _rows(path, kind, problems, advance)), name, path.stat().st_size
                )
                made += drawn
            else:
                rows[name] = tuple(_rows(path, kind, problems, advance))
            if not rows[name] and len(problems) == before:
                problems.append(f"{path.name}: holds no line; write some, or remove the file")
    named = _ONE_OF[about.kind if about else "knowledge"]
    if about and not any((folder / f"{name}.jsonl").exists() for name in named):
        files = " or ".join(f"{name}.jsonl" for name in named)
        problems.append(f"{files}: is missing; a pack of kind {about.kind} says there what to edit")
    if not problems:
        problems += _shared_ids(rows["questions"], rows["open_questions"])
    if problems or about is None:
        shown = "\n  ".join(problems[:40]) + (f"\n  and {len(problems) - 40} more" if len(problems) > 40 else "")
        raise ConceptError(
            f"concept {ref} has {counted(len(problems), 'bad line', 'bad lines')}; correct them:\n  {shown}"
        )
    sums = {path.name: sha256_of(path) for path in sorted(folder.glob("*")) if path.suffix in (".yaml", ".jsonl")}
    return completed(Concept(about, ref, made=made, sha256=sums, folder=folder, **rows))


def _shared_ids(questions: tuple[Question, ...], open_questions: tuple[OpenQuestion, ...]) -> list[str]:
    """Open questions under the id of a question with choices; measurements know both by their ids."""
    ids = {question.id for question in questions}
    return [
        f"open_questions.jsonl: id {row.id!r} is an id of questions.jsonl already; give it another"
        for row in open_questions
        if row.id in ids
    ]


def read_training(path: Path) -> tuple[TrainingRow, ...]:
    """Rows of a JSON lines file to fine-tune on.

    Raises:
        ConceptError: The file has errors; the message lists them with their line numbers.
    """
    problems: list[str] = []
    rows = tuple(row for row in _rows(path, TrainingRow, problems) if isinstance(row, TrainingRow))
    if problems or not rows:
        shown = "\n  ".join(problems[:20] or ["it holds no row"])
        raise ConceptError(
            f"{path.name} has {counted(len(problems), 'bad line', 'bad lines')}; each is messages, prompt and completion, or text:\n  {shown}"
        )
    return rows


def _description(path: Path, problems: list[str]) -> Description | None:
    try:
        return Description.model_validate(read_yaml(path))
    except FileNotFoundError:
        problems.append("concept.yaml: is missing; every pack needs it")
    except ValidationError as error:
        problems += [f"concept.yaml: {_explain(detail)}" for detail in error.errors()]
    except Unreadable as error:
        problems.append(located("concept.yaml", error))
    except OSError as error:
        problems.append(f"concept.yaml: cannot be read: {one_line(error)}")
    return None


def _rows(
    path: Path,
    kind: type[Row] | type[TrainingRow],
    problems: list[str],
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[Row | TrainingRow]:
    seen: dict[str, int] = {}
    groups: dict[str, tuple[str, int]] = {}
    for number, line in _lines(path, problems):
        advance(1 + (len(line) if line.isascii() else len(line.encode())))
        try:
            row = kind.model_validate(parse_json(line))
        except ValidationError as error:
            problems += [f"{path.name}:{number}: {_explain(detail)}" for detail in error.errors()]
            continue
        except ValueError as error:
            problems.append(f"{path.name}:{number}: not a JSON object: {one_line(error)}")
            continue
        if row.id and row.id in seen:
            problems.append(f"{path.name}:{number}: id {row.id!r} is used in line {seen[row.id]} already")
        seen[row.id] = number
        if isinstance(row, Question | OpenQuestion) and row.subject and row.split == "forget":
            group, line_number = groups.setdefault(row.subject, (row.group, number))
            if group != row.group:
                problems.append(
                    f"{path.name}:{number}: subject {row.subject!r} is in {row.group} here and in {group} in line "
                    f"{line_number}; use one group, or an attacker would train on what is measured"
                )
        yield row


def _lines(path: Path, problems: list[str]) -> Iterator[tuple[int, str]]:
    try:
        yield from read_lines(path)
    except (Unreadable, OSError) as error:
        problems.append(f"{path.name}: cannot be read: {one_line(error)}")


PLAIN = {
    "extra_forbidden": "is not a key of this file",
    "missing": "is missing",
    "string_type": "is not a text",
    "int_type": "is not a whole number",
    "int_parsing": "is not a whole number",
    "tuple_type": "is not a list",
    "model_type": "is not an object of keys",
}
"""What a wrong value of a row is, by the library's name of the fault."""


def _explain(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    reason = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "string_pattern_mismatch":
        reason = "is blank"
    reason = PLAIN.get(detail["type"], reason)
    if detail["type"] == "literal_error":
        reason = f"is {str(detail['input'])!r:.60}; give {detail['ctx']['expected']}"
    return f"{where}: {reason}" if where else reason
