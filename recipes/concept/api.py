"""The functions of ``import excise`` that make and check concept packs; the command line calls the same code."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...artifacts.sources.source import MOST
from ...eval.concept import Concept
from ..common.calls import called, events_for
from .benchmarks import folder_of, get
from .check import Checked, check
from .make import MakeRequest, check_held_out, make
from .pack import Made

Sources = str | Path | Sequence[str | Path]
"""One source or several: files, folders, or ``hub:ORG/NAME[:CONFIGURATION][:SPLIT][@REVISION]``."""


def make_concept(
    out: str | Path,
    *,
    forget: Sources = (),
    retain: Sources = (),
    neighbour: Sources = (),
    questions: Sources = (),
    retain_questions: Sources = (),
    prompts: Sources = (),
    unseen: Sources = (),
    positive: Sources = (),
    negative: Sources = (),
    map: str | Sequence[str] = (),
    name: str | None = None,
    description: str | None = None,
    license: str | None = None,
    keywords: Sequence[str] = (),
    held_out: float = 0.5,
    most: int = MOST,
    dry_run: bool = False,
    progress: bool = True,
) -> Made:
    """Make a concept pack of files, folders or data sets on the Hub, as ``excise concept make`` does.

    Args:
        out: Folder to write.
        forget: What to forget: texts, or questions with answers or choices.
        retain: What must stay known, of any form.
        neighbour: The nearest topic that must stay known.
        questions: Questions on what to forget, with answers or choices.
        retain_questions: Questions on what must stay known.
        prompts: Open prompts about the concept, to measure replies on.
        unseen: Texts like those to forget that no model saw, for membership tests.
        positive: Of a behaviour: prompts that bring it about.
        negative: Of a behaviour: prompts like those that do not.
        map: Columns of sources of unknown form, as ``question=prompt,answer=solution``; ``retain:text=body`` is for
            ``retain`` only.
        name: Name of the pack; the folder's by default.
        description: The concept in a few words, as it fits after "a text on".
        license: License of the data, which cards print.
        keywords: Words that show that a reply is about it.
        held_out: Share of the subjects for group V, which no training sees.
        most: Rows to draw of each source, at most.
        dry_run: Read everything and count, but write nothing.
        progress: Show progress, where the error stream is a terminal.

    Returns:
        Lines of each file, what was left out, and what will be made of the files.

    Raises:
        RequestError: The request is wrong, or the Hub refuses.
        ConceptError: A source is damaged or does not fit; the message names the line.

    Example:
        >>> import excise
        >>> from pathlib import Path
        >>> _ = Path("moons.txt").write_text("".join(f"Moon {n} is grey.\\n" for n in range(20)))
        >>> _ = Path("seas.txt").write_text("".join(f"Sea {n} is deep.\\n" for n in range(20)))
        >>> made = excise.make_concept("moons", forget="moons.txt", retain="seas.txt")
        >>> made.counts["forget.jsonl"]
        {'T': 10, 'V': 10}
    """
    sources = {
        "forget": forget, "questions": questions, "neighbour": neighbour, "retain": retain,
        "retain-questions": retain_questions, "unseen": unseen, "prompts": prompts, "positive": positive,
        "negative": negative,
    }  # fmt: skip
    request = MakeRequest(
        Path(out),
        {role: refs for role, given in sources.items() if (refs := _listed(given))},
        maps=_listed(map),
        name=name,
        description=description,
        license=license,
        keywords=tuple(keywords),
        held_out=held_out,
        most=most,
    )
    with called(progress):
        return make(request, events_for(progress), dry_run=dry_run)


def get_concept(
    name: str,
    out: str | Path | None = None,
    *,
    without_gated: bool = False,
    held_out: float = 0.5,
    most: int = MOST,
    dry_run: bool = False,
    progress: bool = True,
) -> Made:
    """Make a concept pack of a published unlearning benchmark, as ``excise concept get`` does.

    Args:
        name: ``wmdp:bio|cyber|chem``, ``tofu:forget01|05|10``, ``muse:news|books``, or ``rwku:PERSON``.
        out: Folder to write; named after the benchmark by default.
        without_gated: Leave out data sets that must be asked for: the texts of ``wmdp:bio``.
        held_out: Share of the subjects for group V, where the benchmark does not say.
        most: Rows to draw of each of its data sets, at most.
        dry_run: Read everything and count, but write nothing.
        progress: Show progress, where the error stream is a terminal.

    Raises:
        RequestError: There is no such benchmark, or the Hub refuses.
        ConceptError: A data set holds something else than it did.

    Example:
        >>> import excise
        >>> excise.get_concept("muse:news").counts["unseen.jsonl"]  # doctest: +SKIP
        {'rows': 4000}
    """
    check_held_out(held_out)
    folder = folder_of(name) if out is None else Path(out)
    how: dict[str, Any] = {"most": most, "held_out": held_out, "without_gated": without_gated, "dry_run": dry_run}
    with called(progress):
        return get(name, folder, events_for(progress), **how)


def check_concept(concept: str | Path | Concept, model: str | Path | None = None, *, progress: bool = True) -> Checked:
    """Ask every recipe, measurement and the audit whether it can use a pack, as ``excise concept check`` does.

    Args:
        concept: ``builtin:NAME``, the folder of a pack, or a pack that was loaded from one.
        model: A model to count tokens by and to check against; without one, words are counted.
        progress: Show progress, where the error stream is a terminal.

    Raises:
        RequestError: There is no such pack or model.
        ConceptError: The pack has bad lines; all of them are listed.

    Example:
        >>> import excise
        >>> checked = excise.check_concept("builtin:declining")
        >>> [use.answer for use in checked.uses if use.name == "orthogonalize"]
        ['runs']
    """
    if isinstance(concept, Concept):
        concept = concept.folder if concept.folder and not concept.ref.startswith("builtin:") else concept.ref
    with called(progress):
        return check(str(concept), None if model is None else str(model))


def _listed(given: Sources) -> tuple[str, ...]:
    """References as texts; one needs no list."""
    return (str(given),) if isinstance(given, str | Path) else tuple(map(str, given))
