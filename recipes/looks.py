"""The functions of ``import excise`` that look at models and runs; the command line calls the same code."""

from collections.abc import Sequence
from pathlib import Path

from ..artifacts.checkpoints.manifest import checkpoint_of, verify_folder
from ..artifacts.checkpoints.staging import refuse_existing
from ..artifacts.quiet import quiet_libraries
from ..artifacts.reporting.outcomes import Run
from . import compare as compare_recipe
from . import diff as diff_recipe
from . import inspect as inspect_recipe
from . import localize as localize_recipe
from . import meta as meta_recipe
from .common.calls import events_for
from .compare import Line
from .diff import Difference
from .inspect import Looked
from .localize import Localized
from .meta import MetaEvaluation


def diff(
    a: str | Path | Run,
    b: str | Path | Run,
    out: str | Path | None = None,
    *,
    spectrum: bool = True,
    progress: bool = True,
) -> Difference:
    """Compare the tensors of two models, as ``excise diff`` does; memory holds one tensor of each at a time.

    Args:
        a: A model on disk: a reference, the folder of a run, or a ``Run``.
        b: A model that was made from it.
        out: Folder for ``diff.json`` and ``diff.svg``; none by default.
        spectrum: Also compute rank and singular values of each change; slow for wide models.
        progress: Show progress, where the error stream is a terminal.

    Returns:
        What differs, the largest relative change first, and how many tensors are the same.

    Raises:
        RequestError: ``out`` exists, or the models share no tensor.

    Example:
        >>> import excise
        >>> found = excise.diff("builtin:testbed", "builtin:testbed-reference", spectrum=False)
        >>> found.changed[0].relative_norm > 0
        True
    """
    if out is not None:
        refuse_existing(Path(out))
    with quiet_libraries(), events_for(progress).stage("compare tensors") as stage:
        found = diff_recipe.difference(_place(a), _place(b), spectrum=spectrum, advance=stage.advance)
    if out is not None:
        diff_recipe.write(found, Path(out))
    return found


def compare(runs: Sequence[str | Path | Run], out: str | Path | None = None) -> tuple[Line, ...]:
    """Put finished runs on one concept side by side, as ``excise compare`` does.

    Args:
        runs: Runs, or their folders.
        out: Folder for ``compare.md``, ``compare.json`` and ``compare.png``; none by default.

    Returns:
        The base, then one line a run, each with its measurements by heading.

    Raises:
        RequestError: ``out`` exists, a folder holds no finished run, or runs are of different concepts.

    Example:
        >>> import excise
        >>> lines = excise.compare(["runs/elm-1", "runs/npo-1"])  # doctest: +SKIP
        >>> {line.name: line.values["forget V"].value for line in lines}  # doctest: +SKIP
        {'base': 0.725, 'elm-1': 0.26, 'npo-1': 0.245}
    """
    folders = [run.folder if isinstance(run, Run) else Path(run) for run in runs]
    if out is None:
        return tuple(compare_recipe.table_of(folders)[0])
    refuse_existing(Path(out))
    return tuple(compare_recipe.compare(folders, Path(out)))


def inspect(
    where: str | Path,
    model: str | Path | Run,
    concept: str | Path | None = None,
    *,
    texts: str | Path | None = None,
    out: str | Path | None = None,
    latents: Sequence[int] = (),
    top: int | None = None,
    score: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: bool = True,
) -> Looked:
    """Look at directions on disk, or at latents of an autoencoder, through a model, as ``excise inspect`` does.

    Args:
        where: A ``directions.safetensors``, the folder of a caft run, or an autoencoder's folder.
        model: The model on disk that they belong to.
        concept: The pack whose texts are read.
        texts: JSON lines of texts to read instead of a pack's.
        out: Folder for ``inspect.json`` and ``inspect.html``; none by default.
        latents: Latents of an autoencoder to look at; the highest-scoring by default.
        top: How many of those.
        score: ``contrast`` (of the pack's pairs) or ``attribution`` (to the texts' loss).
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        progress: Show progress, where the error stream is a terminal.

    Returns:
        Each direction's top tokens and contexts, and the loss when it is ablated.

    Raises:
        RequestError: Anything that could not work, found before the model is loaded.

    Example:
        >>> import excise
        >>> looked = excise.inspect("runs/caft-1", "builtin:testbed", "builtin:shortcut")  # doctest: +SKIP
        >>> looked.directions[0].top_tokens[:2]  # doctest: +SKIP
        (' red', ' scarlet')
    """
    with quiet_libraries(), events_for(progress).stage("look at directions") as stage:
        return inspect_recipe.inspect(
            Path(where),
            _place(model),
            None if concept is None else str(concept),
            None if texts is None else Path(texts),
            None if out is None else Path(out),
            device,
            dtype,
            stage.advance,
            latents=latents,
            top=top,
            score=score,
        )


def localize(
    model: str | Path | Run,
    concept: str | Path,
    out: str | Path | None = None,
    *,
    facts: int = localize_recipe.FACTS,
    checked: int = localize_recipe.CHECKED,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    progress: bool = True,
) -> Localized:
    """Find in which layers a model computes a concept's facts, as ``excise localize`` does.

    Args:
        model: A model on disk.
        concept: A knowledge pack; its facts are recovered from texts and questions.
        out: Folder for ``localize.json`` and ``localize.svg``; none by default.
        facts: Facts to trace, at most.
        checked: Facts on which the estimates are checked by exact patching.
        seed: Draws facts, and the subjects that they are compared with.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        progress: Show progress, where the error stream is a terminal.

    Returns:
        Each site's effect with its interval: a share of the right answer, 0 to 1.

    Raises:
        RequestError: ``out`` exists, the pack states no facts, or fewer than five can be traced.

    Source:
        Meng et al. 2022 (causal tracing); Zhang and Nanda 2023 (replaced subjects); Nanda 2023 (attribution patching).

    Example:
        >>> import excise
        >>> found = excise.localize("builtin:testbed", "builtin:potions", checked=0)  # doctest: +SKIP
        >>> found.window  # doctest: +SKIP
        (0, 6)
    """
    if out is not None:
        refuse_existing(Path(out))
    with quiet_libraries():
        job = localize_recipe.prepare(_place(model), str(concept), facts=facts, checked=checked, seed=seed)
        found = localize_recipe.run(job, events_for(progress), device, dtype)
    if out is not None:
        localize_recipe.write(found, Path(out))
    return found


def meta(
    knows: Sequence[str | Path | Run],
    never: Sequence[str | Path | Run],
    concept: str | Path,
    edited: Sequence[str | Path | Run] = (),
    out: str | Path | None = None,
    *,
    questions: int = 0,
    steps: int = meta_recipe.STEPS,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    progress: bool = True,
) -> MetaEvaluation:
    """Find out which measurements to believe, as ``excise meta`` does.

    Args:
        knows: Models on disk that have the knowledge, two or more.
        never: Models that never had it, two or more; the first is taught too.
        concept: A knowledge pack.
        edited: Models that are also measured rounded to 4 bits and relearned.
        out: Folder for ``meta.json``; none by default.
        questions: Most questions and texts of each split; 0 takes all.
        steps: Of relearning from group T.
        seed: Of relearning.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        progress: Show progress, where the error stream is a terminal.

    Returns:
        For each measurement the probability that models are the right way round (AUC) with its interval, and how steady
        it is; the most faithful first.

    Raises:
        RequestError: A pool has fewer than two models, or the pack has nothing to relearn from.

    Source:
        Faithfulness and robustness of measurements: OpenUnlearning (arXiv 2506.12618); symmetric forms: Lee et al. 2026
        (arXiv 2605.24614).

    Example:
        >>> import excise
        >>> found = excise.meta(["base", "base-2"], ["never", "never-2"], "my-pack")  # doctest: +SKIP
        >>> found.measurements[0].auc  # doctest: +SKIP
        1.0
    """
    if out is not None:
        refuse_existing(Path(out))
    known, unknown, changed = ([str(_place(model)) for model in pool] for pool in (knows, never, edited))
    with quiet_libraries():
        job = meta_recipe.prepare(
            known,
            unknown,
            changed,
            str(concept),
            questions=questions,
            steps=steps,
            seed=seed,
            device=device,
            dtype=dtype,
        )
        found = meta_recipe.run(job, events_for(progress))
    if out is not None:
        meta_recipe.write(found, Path(out))
    return found


def verify(folder: str | Path | Run, key: str | Path | None = None) -> int:
    """Check that a checkpoint is as it was published, as ``excise verify`` does.

    Args:
        folder: A checkpoint, the folder of a run, or a ``Run``.
        key: PEM file of the public key that must have signed it (extra: sign).

    Returns:
        How many files were compared with their checksums.

    Raises:
        VerifyError: A file is missing, has other bytes, or the signature does not fit.
        RequestError: The folder holds no checkpoint of excise.

    Example:
        >>> import excise
        >>> excise.verify("runs/elm-1")  # doctest: +SKIP
        9
    """
    target = checkpoint_of(folder.checkpoint if isinstance(folder, Run) else Path(folder))
    count = verify_folder(target)
    if key is not None:
        from ..artifacts.checkpoints.signature import check_signature

        check_signature(target, Path(key))
    return count


def _place(model: str | Path | Run) -> str:
    return str(model.checkpoint if isinstance(model, Run) else model)
