"""What a pack can be used for, before any weight is read: each recipe, measurement and attack is asked itself."""

import importlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from ...artifacts.concepts import load_concept, read_once
from ...artifacts.files.opened import summed_once
from ...artifacts.files.parsed import read_object
from ...artifacts.models.find import find_model
from ...artifacts.models.load import load_tokenizer
from ...artifacts.models.source import ModelSource
from ...artifacts.reporting.terminal import aligned, bullets, terminal_width
from ...editing.errors import ExciseError, counted, one_line
from ...eval.concept import FILES, Concept, Prompt
from ...eval.inference.encoding import encode
from ...eval.measurements import MEASUREMENTS
from ...eval.measurements.table import function_of
from ...eval.model_under_test import EvalSettings
from .. import RECIPES
from ..audit import request as audit
from ..audit.attacks.table import BUDGETS
from ..common.memory_sizes import Unplanned
from ..common.settings import settings_of_call
from ..suites import SUITES, suite_module
from .cost import Cost, estimated, in_words, rate_here

STANDS_IN, STANDS_IN_EDITED = "builtin:testbed", "builtin:testbed-reference"
"""Models by which a pack is checked where none is named: checks read the pack and the configuration alone."""
Answer = Literal["runs", "runs with less", "does not run"]
MOST_COUNTED = 400_000
"""Tokens of a text file that are counted, at most; more are estimated from these."""


@dataclass(frozen=True)
class Use:
    """What a recipe, measurement or audit answers to the question whether it can use the pack."""

    kind: str
    name: str
    answer: Answer
    why: str = ""


@dataclass(frozen=True)
class File:
    """What a file of the pack holds, with what was made for it."""

    name: str
    rows: int
    groups: dict[str, int]
    median: float
    longest: int
    total: int
    unit: str


@dataclass(frozen=True)
class Checked:
    """A pack and its uses."""

    name: str
    kind: str
    files: tuple[File, ...]
    made: tuple[str, ...]
    uses: tuple[Use, ...]
    suite: str | None
    """The benchmark whose rows the pack holds."""
    longer: int
    """Texts that are longer than the model reads at once; 0 where no model is named."""
    costs: tuple[Cost, ...] = ()
    """Of the recipes that run, where a model is named."""

    def __str__(self) -> str:
        return text(self, terminal_width())

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return asdict(self)


def check(pack: str, model: str | None = None) -> Checked:
    """Ask everything that can use a pack whether it can use this one.

    Args:
        pack: ``builtin:NAME``, or the pack's folder.
        model: A model to count tokens by and to check against; without one, words are counted.

    Raises:
        RequestError: There is no such pack or model.
        ConceptError: The pack has bad lines; all of them are listed.

    Example:
        >>> [use.answer for use in check("builtin:potions").uses if use.name == "npo"]
        ['runs']
    """
    # Every recipe looks for the model itself, and the sum of a large file takes as long as reading it.
    with read_once(), summed_once():
        source = find_model(model) if model else None
        concept = load_concept(pack)
        files, longer = _files(concept, source)
        lengths = {file.name: file.total / file.rows for file in files}
        recipes, costs = _recipes(pack, model, lengths)
        audited = _audit(pack)
    uses = [*recipes, *audited, *_measurements(concept), *_benchmarks(concept)]
    about = concept.about
    return Checked(concept.ref, about.kind, files, concept.made, tuple(uses), about.suite, longer, tuple(costs))


def _recipes(pack: str, model: str | None, lengths: dict[str, float]) -> tuple[list[Use], list[Cost]]:
    """Each recipe's own checks, which it makes before it loads a model, and what it would cost with the model."""
    uses, costs = [], []
    rate = rate_here() if model else 0.0
    for name, recipe in RECIPES.items():
        module = importlib.import_module(recipe.module)
        with TemporaryDirectory(prefix="excise-check-") as folder:
            settings: dict[str, Any] = {"model": model or STANDS_IN, "concept": pack, "out": Path(folder) / "run"}
            kind = getattr(module, recipe.settings)
            # What a recipe cannot do without is a further model, such as one to learn from.
            required = [key for key, field in kind.model_fields.items() if field.is_required()]
            settings |= {key: settings["model"] for key in required if key not in settings}
            try:
                asked = settings_of_call(kind, settings)
                job = module.prepare(asked)
                plan = module.describe(job)
                uses.append(_use("recipe", name, list(plan.get("gaps", ()))))
                if model:
                    itemsize = getattr(torch, plan["dtype"]).itemsize
                    memory = _peak_memory(module, job)
                    costs.append(
                        estimated(name, plan, itemsize, getattr(asked, "batch_size", 0), lengths, rate, memory)
                    )
            except ExciseError as error:
                uses.append(Use("recipe", name, "does not run", one_line(error)))
    return uses, costs


def _peak_memory(module: Any, job: Any) -> int:
    """Bytes that a run holds at its peak; 0 where that is not planned."""
    try:
        return int(module.memory(job).peak.total) if hasattr(module, "memory") else 0
    except Unplanned:
        return 0


def _audit(pack: str) -> list[Use]:
    """Every attack of the longest budget; what cannot be tested is what the audit itself lists as a gap."""
    with TemporaryDirectory(prefix="excise-check-") as folder:
        # Whether a model was edited says nothing of the pack, and some other model must stand in its place.
        models = {"model": STANDS_IN_EDITED, "base": STANDS_IN}
        settings = audit.AuditSettings.model_validate(
            {**models, "concept": pack, "budget": "long", "out": Path(folder) / "audit"}
        )
        try:
            job = audit.prepare(settings)
        except ExciseError as error:
            return [Use("audit", "audit", "does not run", one_line(error))]
    left_out = [name for name in BUDGETS["long"].attacks_on(job.kind) if name not in job.attacks]
    less = list(job.gaps)
    if left_out:
        less.insert(0, f"without {', '.join(left_out)}")
    return [_use("audit", "audit", less)]


NEEDED = {
    "multiple_choice": "questions.jsonl or open_questions.jsonl",
    "answer_probability": "open_questions.jsonl",
    "extraction_strength": "forget.jsonl, in a pack of kind knowledge",
    "perplexity": "retain.jsonl",
}
"""Files that measurements read."""


def _measurements(concept: Concept) -> list[Use]:
    """Which rows of the table find something to measure."""
    settings, uses = EvalSettings(), []
    for name, row in MEASUREMENTS.items():
        if row.requests:
            count = len(function_of(row.requests)(concept, settings))
            why = "" if count else f"nothing to measure; it reads {NEEDED.get(name, 'other files')}"
            uses.append(Use("measurement", name, "runs" if count else "does not run", why))
    return uses


def _benchmarks(concept: Concept) -> list[Use]:
    """Whether the pack makes a benchmark's own table."""
    uses = []
    for name in SUITES:
        lacking = suite_module(name).needs(concept)
        why = f"needs {'; '.join(lacking)}" if lacking else ""
        uses.append(Use("benchmark", name, "does not run" if lacking else "runs", why))
    return uses


def _use(kind: str, name: str, less: Sequence[str]) -> Use:
    return Use(kind, name, "runs with less" if less else "runs", "; ".join(less))


def _files(concept: Concept, source: ModelSource | None) -> tuple[tuple[File, ...], int]:
    tokenizer = load_tokenizer(source) if source else None
    context = _context(source) if source else math.inf
    files, longer = [], 0
    for name in FILES:
        rows = getattr(concept, name)
        if not rows:
            continue
        texts = [_text(row) for row in rows]
        lengths = _lengths(texts, tokenizer)
        longer += sum(length > context for length in lengths)
        groups: dict[str, int] = {}
        for row in rows:
            label = " ".join(part for part in (getattr(row, "split", ""), getattr(row, "group", "")) if part)
            if label:
                groups[label] = groups.get(label, 0) + 1
        total = round(sum(lengths) * len(texts) / max(1, len(lengths)))
        unit = "tokens" if tokenizer else "words"
        files.append(File(name, len(rows), groups, statistics.median(lengths), max(lengths), total, unit))
    return tuple(files), longer


def _lengths(texts: Sequence[str], tokenizer: Any) -> list[int]:
    lengths, read = [], 0
    for text in texts:
        lengths.append(len(encode(tokenizer, text)) if tokenizer else len(text.split()))
        read += lengths[-1]
        if read > MOST_COUNTED:
            break
    return lengths


def _text(row: Any) -> str:
    """What a model reads of a row."""
    if isinstance(row, Prompt):
        return row.prompt
    parts = [getattr(row, name, None) for name in ("prompt", "positive", "negative", "text", "answer", "completion")]
    messages = " ".join(message.content for message in getattr(row, "messages", ()))
    return " ".join([part for part in parts if isinstance(part, str)] + [messages]).strip()


def _context(source: ModelSource) -> float:
    config = read_object(source.folder / "config.json")
    return float(config.get("text_config", config).get("max_position_embeddings") or math.inf)


def text(checked: Checked, width: int | None) -> str:
    """What a pack holds and what it can be used for, for a terminal."""
    unit = checked.files[0].unit
    rows = [
        [file.name, f"{file.rows:,}", f"{file.median:g}", f"{file.longest:,}", f"{file.total:,}", _groups(file.groups)]
        for file in checked.files
    ]
    parts = [f"{checked.name}: {checked.kind}\n"]
    parts.append(aligned(["file", "rows", f"{unit}, median", "longest", "all", "of them"], rows, width) + "\n")
    if checked.longer:
        parts.append(
            f"{counted(checked.longer, 'text is', 'texts are')} longer than the model reads at once; recipes read such texts in"
            " pieces.\n"
        )
    if checked.made:
        parts.append("What it does not hold was made:\n" + bullets(checked.made, width) + "\n")
    shown = [
        use for use in checked.uses if use.kind != "benchmark" or use.answer == "runs" or use.name == checked.suite
    ]
    rows = [[use.name, use.answer, use.why] for use in shown]
    parts.append(aligned(["use", "", "what is lost, or what to add"], rows, width))
    if checked.costs:
        parts.append("\nLeast cost of runs with default settings; most take several times as long:")
        parts.append(bullets(in_words(checked.costs), width))
    if len(shown) < len(checked.uses):
        parts.append("\nPacks of benchmarks are made by excise concept get.")
    return "\n".join(parts)


def _groups(groups: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in groups.items())
