"""The functions of ``import excise`` that run a whole recipe; the command line calls the same recipes."""

import importlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

from torch import nn

from ..artifacts.models.find import find_model
from ..artifacts.models.load import choose_device, choose_dtype
from ..artifacts.models.load import load_model as load_found
from ..artifacts.models.source import ModelInMemory
from ..artifacts.quiet import quiet_libraries
from ..artifacts.reporting.outcomes import Audit, Evaluation, Run
from ..artifacts.reporting.results import RESULTS
from ..editing.edits.base import WeightEdit
from ..editing.edits.changes import Change
from ..editing.errors import RequestError, nearest
from ..eval.concept import Concept
from . import RECIPES, apply_budget
from . import apply as apply_recipe
from . import evaluate as evaluate_recipe
from .audit import recipe as audit_recipe
from .common.calls import called, events_for
from .common.kl_budget import Budget
from .common.run_folder import letting_go, resumed
from .common.settings import settings_of_call
from .in_memory import IN_MEMORY, AppliedEdit
from .suites import run as suites
from .suites.figures import SuiteTable

AnyModel = str | Path | Run | tuple[nn.Module, Any]
"""A reference (``builtin:NAME``, a Hub id, a folder, a .gguf file, the folder of a run), a run, or a model with its
tokenizer."""
AnyConcept = str | Path | Concept
"""``builtin:NAME``, the folder of a pack, or a loaded pack."""


@dataclass(frozen=True)
class AppliedCheckpoint:
    """A checkpoint that a saved edit was applied to."""

    folder: Path
    """The edited checkpoint."""
    changes: tuple[Change, ...] = field(repr=False)
    """What the edit did to each declared tensor."""
    bytes_written: int

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        changes = [asdict(change) for change in self.changes]
        return {"out": str(self.folder), "bytes_written": self.bytes_written, "changes": changes}


def load_model(reference: str | Path, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """Load a model and its tokenizer into memory, in evaluation mode.

    Only safetensors are read, no code of the model is run, and a missing or unexpected tensor is an error.

    Args:
        reference: ``builtin:NAME``, a Hub id with optional ``@revision``, a folder, a .gguf file, or the folder of a
            run.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.

    Returns:
        The model, and the tokenizer with padding on the left.

    Raises:
        RequestError: Nothing has that name, or there is no such device.
        CheckpointError: The weights and the configuration do not fit together.

    Example:
        >>> import excise
        >>> model, tokenizer = excise.load_model("builtin:testbed")
        >>> model.config.model_type
        'llama'
    """
    chosen = choose_device(device)
    with quiet_libraries():
        loaded = load_found(find_model(str(reference)), chosen, choose_dtype(dtype, chosen))
    return loaded.model, loaded.tokenizer


def load_run(folder: str | Path) -> Run:
    """Read a finished run from its folder.

    Args:
        folder: The ``out`` of the run.

    Raises:
        RequestError: The folder holds no finished run.

    Example:
        >>> import excise
        >>> excise.load_run("nowhere")
        Traceback (most recent call last):
        excise.editing.errors.RequestError: nowhere holds no finished run (no checkpoint/excise/eval.json); ...
    """
    return Run.read(folder)


def run(
    recipe: str,
    model: str | Path | None = None,
    concept: AnyConcept | None = None,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Run:
    """Run a recipe: edit a model, measure the edit, write the checkpoint and its report.

    Args:
        recipe: ``orthogonalize``, ``elm``, ``prune``, ``rmu`` and so on; ``excise list recipes`` shows all.
        model: Model to edit: ``builtin:NAME``, a Hub id, a folder or a .gguf file; ``builtin:testbed`` by default.
        concept: Concept pack that says what to edit and how to measure it; ``builtin:declining`` by default.
        out: Folder to write; ``runs/RECIPE-N`` by default.
        resume: Continue the unfinished run in ``out``; a finished one is read and returned.
        progress: Show progress, where the error stream is a terminal.
        **settings: Settings of the recipe; ``excise list RECIPE`` shows all with their defaults.

    Returns:
        The finished run: ``checkpoint``, ``table``, ``findings``; it shows itself in a notebook.

    Raises:
        RequestError: Anything that could not work, found before a weight is read.
        ExciseError: The run failed; an unfinished run can be resumed.

    Example:
        >>> import excise
        >>> run = excise.run("orthogonalize", out="runs/first", questions=20)  # doctest: +SKIP
        >>> run.findings[0]  # doctest: +SKIP
        'On prompts that show the behaviour the model declined ...'
    """
    if recipe not in RECIPES:
        raise RequestError(f"no recipe {recipe!r}{nearest(recipe, list(RECIPES))}; recipes: {', '.join(RECIPES)}")
    if isinstance(model, tuple | nn.Module):
        raise RequestError(
            "run needs a model on disk, because it streams the checkpoint; save model and tokenizer with "
            "save_pretrained(FOLDER) and give model=FOLDER"
        )
    module = importlib.import_module(RECIPES[recipe].module)
    values = {**settings, "model": _text(model), "concept": _pack_reference(concept), "out": _path(out)}
    chosen = settings_of_call(getattr(module, RECIPES[recipe].settings), values)
    if resume:
        if chosen.out is not None and (chosen.out / "checkpoint" / RESULTS).is_file():
            return Run.read(chosen.out)
        chosen = resumed(chosen, recipe)
    with called(progress), letting_go():
        finished = module.run(module.prepare(chosen, resume=resume), events_for(progress))
    # As it stands on disk: a run that is read again later is equal to this one.
    return replace(Run.read(finished.out), base=chosen.model, concept=chosen.concept)


@overload
def evaluate(
    models: AnyModel | Sequence[AnyModel] | Mapping[str, AnyModel],
    concept: AnyConcept | None = None,
    base: AnyModel | None = None,
    *,
    suite: None = None,
    judge: str | Sequence[str] = (),
    rubric: str | Path | None = None,
    judge_key: str | None = None,
    lm_eval: str | Sequence[str] = (),
    progress: bool = True,
    **settings: Any,
) -> Evaluation: ...
@overload
def evaluate(
    models: AnyModel | Sequence[AnyModel] | Mapping[str, AnyModel],
    concept: AnyConcept | None = None,
    base: AnyModel | None = None,
    *,
    suite: str,
    reference: AnyModel | None = None,
    progress: bool = True,
    **settings: Any,
) -> SuiteTable: ...
def evaluate(
    models: AnyModel | Sequence[AnyModel] | Mapping[str, AnyModel],
    concept: AnyConcept | None = None,
    base: AnyModel | None = None,
    *,
    suite: str | None = None,
    reference: AnyModel | None = None,
    judge: str | Sequence[str] = (),
    rubric: str | Path | None = None,
    judge_key: str | None = None,
    lm_eval: str | Sequence[str] = (),
    progress: bool = True,
    **settings: Any,
) -> Evaluation | SuiteTable:
    """Measure one or several models with a concept pack, all on the same items.

    A model in memory is measured on its device and in its dtype, and is left as it was.

    Args:
        models: One model or several: each a reference, the folder of a run, a ``Run``, or ``(model, tokenizer)`` in
            memory. A mapping names them.
        concept: The concept pack; that of the runs by default.
        base: The model that they were made from; differences from it are then reported. That of the runs by default,
            where the concept is theirs too.
        suite: ``tofu``, ``muse``, ``wmdp`` or ``rwku``: return the benchmark's own table, of a pack that holds its rows;
            ``auto`` takes the one that the pack names.
        reference: A model that was trained without what is to be forgotten, for forget quality and PrivLeak of a suite.
        judge: Further models that read the replies, each a model's reference, or the server and model of an
            OpenAI-compatible API, ``https://HOST/v1#MODEL``.
        rubric: A YAML file, or ``default``, by which judges grade each reply. Judges behind a server always do.
        judge_key: Name of the environment variable that holds the key of judges behind a server.
        lm_eval: Tasks of the lm-evaluation-harness, by name or YAML file (extra: lm-eval).
        progress: Show progress, where the error stream is a terminal.
        **settings: Where models on disk are computed: ``device``, ``dtype``; how much is measured: ``questions``
            (questions and texts of a split, at most; 0 takes all), ``max_new_tokens`` (tokens of a reply),
            ``kl_prompts``, ``as_shipped``; and how prompts are rendered: ``date``, ``thinking``, ``response_prefix``,
            ``template``. They are those of ``excise list eval``.

    Returns:
        A table with one row for each measurement; of a suite, one with the benchmark's own lines. Either shows itself in
        a notebook.

    Raises:
        RequestError: Anything that could not work, found before a model is loaded.

    Example:
        >>> import excise
        >>> loaded = excise.load_model("builtin:testbed", dtype="float32")
        >>> found = excise.evaluate(loaded, "builtin:shortcut", questions=4, max_new_tokens=4)
        >>> found.measurement("multiple_choice", "flipped").n
        4
        >>> table = excise.evaluate(  # doctest: +SKIP
        ...     "runs/npo-1", "tofu-forget10", suite="tofu", reference="ORG/RETRAINED"
        ... )
        >>> table.value("npo-1", "model utility").value  # doctest: +SKIP
        0.62
        >>> graded = excise.evaluate(  # doctest: +SKIP
        ...     "runs/npo-1", judge="http://localhost:8000/v1#qwen", judge_key="KEY_OF_THE_JUDGE"
        ... )
    """
    values = {
        **settings,
        "suite": suite,
        "judge": _names(judge),
        "rubric": _text(rubric),
        "judge_key": judge_key,
        "lm_eval": _names(lm_eval),
    }
    references = [_reference(model, name) for name, model in _named(models)]
    chosen = settings_of_call(evaluate_recipe.EvaluateSettings, values).completed(references)
    if reference is not None and suite is None:
        raise RequestError("reference is used by suites alone; give suite too, or leave it out")
    pack = concept if concept is None or isinstance(concept, Concept) else str(concept)
    before = None if base is None else _reference(base, f"base, {IN_MEMORY}")
    how: dict[str, Any] = {"device": chosen.device, "dtype": chosen.dtype, "settings": chosen.measuring()}
    with called(progress):
        if chosen.suite is not None:
            known = None if reference is None else _reference(reference, f"reference, {IN_MEMORY}")
            asked = suites.prepare(references, pack, chosen.suite, before, known, **how)
            return suites.run(asked, events_for(progress))
        job = evaluate_recipe.prepare(
            references,
            pack,
            before,
            judges=chosen.judge,
            rubric=chosen.rubric,
            judge_key=chosen.judge_key,
            benchmarks=chosen.lm_eval,
            **how,
        )
        return evaluate_recipe.run(job, events_for(progress))


def _names(names: str | Sequence[str]) -> tuple[str, ...] | None:
    """Names of a call, of which one needs no list."""
    return ((names,) if isinstance(names, str) else tuple(names)) or None


def audit(
    model: AnyModel,
    concept: AnyConcept | None = None,
    base: AnyModel | None = None,
    *,
    budget: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Audit:
    """Red-team an edited model: try to recover what was erased, and report a verdict.

    A model in memory is saved to a temporary folder for the time of the audit.

    Args:
        model: The model to audit: a ``Run``, a reference, or ``(model, tokenizer)`` in memory.
        concept: Concept pack that was erased, of kind knowledge; that of the run by default.
        base: The model that it was made from; that of the run by default.
        budget: ``quick`` (default), ``standard`` or ``long``: minutes, tens of minutes, hours.
        out: Folder to write; ``runs/audit-N`` by default.
        resume: Continue the unfinished audit in ``out``.
        progress: Show progress, where the error stream is a terminal.
        **settings: Further settings: ``reference`` (a model that never learned the concept), ``attacks`` (names, where
            not those of the budget), ``questions`` (of group V, at most), ``locked``, ``removed``, ``seed``, ``device``,
            ``dtype``, ``fresh``.

    Returns:
        ``verdict``, ``reasons`` and a table with one row for each attack; it shows itself in a notebook.

    Raises:
        RequestError: Anything that could not work, found before a weight is read.

    Example:
        >>> import excise
        >>> found = excise.audit("runs/elm-1", "builtin:potions", "builtin:testbed")  # doctest: +SKIP
        >>> found.verdict  # doctest: +SKIP
        'recovers'
    """
    audited = _run_at(model)
    with ExitStack() as stack:
        # A folder in a temporary place: attacks read the base's weights from disk, tensor by tensor.
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="excise-")))
        values = {
            **settings,
            "model": _on_disk(model, folder / "model-in-memory"),
            "base": _base_of(audited) if base is None else _on_disk(base, folder / "base-in-memory"),
            "concept": _concept_of(audited) if concept is None else _pack_reference(concept),
            "budget": budget,
            "out": _path(out),
        }
        chosen = settings_of_call(audit_recipe.AuditSettings, values)
        if resume:
            chosen = resumed(chosen, "audit")
        with called(progress), letting_go():
            prepared = audit_recipe.prepare(chosen, resume=resume)
            return Audit(prepared.out, audit_recipe.run(prepared, events_for(progress)))


def apply(
    edit: WeightEdit | AppliedEdit | Run | str | Path,
    base: str | Path | None,
    out: str | Path,
    *,
    kl_budget: float | None = None,
    max_strength: float = 1.0,
    concept: str | Path | None = None,
    progress: bool = True,
) -> AppliedCheckpoint:
    """Apply an edit or a PEFT adapter to a checkpoint of any size; the weights are streamed, the model is never loaded.

    Args:
        edit: An edit, what ``orthogonalize`` returned, a run, or a folder with ``edit.json`` (or of a run or
            checkpoint), or the folder or Hub id of a PEFT adapter.
        base: The checkpoint to edit, which must be of the kind that the edit was learned on; None takes the base that
            an adapter names.
        out: Folder to write.
        kl_budget: Nats per token by which the model may move from its base on retain texts; the edit's strength is
            chosen by it, and the base is loaded for that. None applies the edit as it was learned.
        max_strength: The highest strength that is tried.
        concept: Pack whose retain texts are used; by default the built-in pack that the edit's record names.
        progress: Show progress, where the error stream is a terminal.

    Raises:
        RequestError: ``out`` exists, the folder holds no edit, or the edit was learned on another kind of model.

    Example:
        >>> import excise, torch
        >>> model, _ = excise.load_model("builtin:testbed", dtype="float32")
        >>> with excise.orthogonalize(model, torch.ones(model.config.hidden_size)) as applied:
        ...     made = excise.apply(applied, base="builtin:testbed", out="edited")
        >>> made.folder.name
        'edited'
    """
    if isinstance(base, tuple | nn.Module):
        raise RequestError("apply needs a base on disk; give its folder, or edit a model in memory with orthogonalize")
    edit_or_folder = edit.edit if isinstance(edit, AppliedEdit) else edit
    if isinstance(edit_or_folder, Run | str | Path):
        edit_or_folder = _edit_folder(
            edit_or_folder.folder if isinstance(edit_or_folder, Run) else Path(edit_or_folder)
        )
    prepared, events = apply_recipe.prepare(edit_or_folder, _text(base), Path(out)), events_for(progress)
    if kl_budget is not None:
        budget = Budget(kl_budget, max_strength)
        pack = apply_budget.prepare(prepared, budget, None if concept is None else str(concept))
        prepared = apply_budget.fitted(prepared, budget, pack, events)
    export = apply_recipe.run(prepared, events)
    return AppliedCheckpoint(Path(out), tuple(export.changes), export.bytes_written)


def _named(models: Any) -> list[tuple[str, Any]]:
    """Every model with the name that it gets if it is in memory."""
    if isinstance(models, Mapping):
        named = list(models.items())
    # A model with its tokenizer is a tuple too, so it is told from a sequence of models first.
    elif isinstance(models, str | Path | Run | nn.Module) or _is_pair(models):
        named = [(IN_MEMORY, models)]
    else:
        named = [(IN_MEMORY, model) for model in models]
    if not named:
        raise RequestError("there is no model to measure; give at least one")
    return named


def _is_pair(model: Any) -> bool:
    return isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], nn.Module)


def _reference(model: Any, name: str) -> str | ModelInMemory:
    """A model as recipes take it."""
    if _is_pair(model):
        return ModelInMemory(name, model[0], model[1])
    if isinstance(model, nn.Module):
        raise RequestError("a model in memory needs its tokenizer; give (model, tokenizer)")
    if isinstance(model, Run):
        return str(model.checkpoint)
    if isinstance(model, str | Path):
        return str(model)
    raise RequestError(
        f"got {type(model).__name__} for a model; give a folder, a Hub id, builtin:NAME, a run, or (model, tokenizer)"
    )


def _on_disk(model: Any, folder: Path) -> str:
    """A model's reference; one in memory is saved into a folder first."""
    reference = _reference(model, IN_MEMORY)
    if isinstance(reference, str):
        return reference
    with quiet_libraries():
        reference.model.save_pretrained(folder)
        reference.tokenizer.save_pretrained(folder)
    return str(folder)


def _run_at(model: Any) -> Run | None:
    """The run that a model is of, where it was given as a run or its folder."""
    if isinstance(model, Run):
        return model
    is_folder = isinstance(model, str | Path) and (Path(model) / "checkpoint" / RESULTS).is_file()
    return Run.read(model) if is_folder else None


def _base_of(audited: Run | None) -> str | None:
    if audited is not None and audited.base is None:
        raise RequestError(
            f"the base of {audited.folder} was the local {audited.results['base']['name']}; give base=PATH"
        )
    return audited.base if audited else None


def _concept_of(audited: Run | None) -> str | None:
    if audited is not None and audited.concept is None:
        raise RequestError(
            f"the concept of {audited.folder} was the local pack {audited.results['concept']['ref']}; give"
            " concept=FOLDER"
        )
    return audited.concept if audited else None


def _pack_reference(concept: AnyConcept | None) -> str | None:
    if isinstance(concept, Concept):
        return str(concept.folder) if concept.folder and not concept.ref.startswith("builtin:") else concept.ref
    return _text(concept)


def _edit_folder(place: Path) -> Path:
    """Where a run, a checkpoint or an edit keeps its edit."""
    folders = (place / "checkpoint" / "excise", place / "excise", place)
    return next((folder for folder in folders if (folder / "edit.json").is_file()), place)


def _text(value: str | Path | None) -> str | None:
    return None if value is None else str(value)


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)
