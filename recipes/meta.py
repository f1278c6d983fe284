"""Measurements are measured: do they tell models that know from models that never did, and do they stay put?

Every measurement of a pack is made on models of which it is known whether they have the knowledge, and on edited models
before and after two things that change no knowledge a model never had: rounding to 4 bits, and relearning from group T.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from ..artifacts.checkpoints.read import open_checkpoint
from ..artifacts.checkpoints.staging import staged_folder
from ..artifacts.checkpoints.tensor_cache import TensorCache, scope_of
from ..artifacts.concepts import load_concept
from ..artifacts.events import Events, Stage
from ..artifacts.models.cache import cache_folder
from ..artifacts.models.dequantized import check_loadable
from ..artifacts.models.find import find_model
from ..artifacts.models.load import LoadedModel, choose_device, choose_dtype, load_model
from ..artifacts.models.source import ModelSource
from ..editing.edits.fake_quantization import rounded_weights
from ..editing.errors import EditError, RequestError, counted
from ..editing.training.packing import packing
from ..eval.concept import Concept, Question
from ..eval.intervals import Interval
from ..eval.measurements.table import measure, workload
from ..eval.model_under_test import EvalSettings, ModelUnderTest
from ..eval.separation import auc, auc_interval, harmonic_mean, same_gain, steadiness
from ..eval.statistics import Scores
from .audit.attack_data import AttackData
from .audit.attacks.fine_tuning import low_rank
from .audit.command import pasted, relative
from .audit.gaps import without_gaps
from .common.examples import example_batch, scored_nats
from .common.run_inputs import code_digest
from .common.step_parts import COUNTS
from .common.trainer import Group, Schedule, Terms, fit
from .data.facts import Facts, find_facts

STEPS, BATCH, RATE = 32, 8, 1e-3
RELEARNS_AS = "rtt"
"""The attack that reads what relearning reads."""
POOLS = ("knows", "never", "edited")
FEWEST = 2
"""Models of each pool, at least."""
BITS = 4
COMPUTES = ("editing", "eval", "artifacts/models", "recipes/audit", "recipes/common")
"""Folders whose code decides what a model scores."""
UNTOUCHED, ROUNDED, RELEARNED = "untouched", "rounded to 4 bits", "relearned"
Key = tuple[str, str]
"""Name and split of a measurement."""
Measured = dict[Key, Scores]
"""Of one model in one state; what could not be scored is left out."""
_SCORES = TypeAdapter(list[Scores])
_WORDS = "words"


@dataclass(frozen=True)
class Judged:
    """One measurement on one split, and what it is worth."""

    name: str
    split: str
    unit: str
    knowing: float
    """Mean over the models that know."""
    unknowing: float
    """Mean over the models that never did."""
    higher: str
    """Which pool should have the higher values, as the table of measurements says: ``knows`` or ``never``; ``either``
    where the knowledge should make no difference, and then those that know are taken to."""
    auc: float
    """Probability that a model that knows and one that does not are the right way round: 0.5 is chance."""
    ci95: Interval
    four_bits: float | None
    """How little rounding moves it, 0 to 1, mean over the edited models; None without any."""
    relearning: float | None
    """How alike an edited model and one that never knew move when both are taught group T, 0 to 1."""

    @property
    def overall(self) -> float | None:
        """Harmonic mean of the share beyond chance that the AUC reaches, and of both kinds of steadiness."""
        if self.four_bits is None or self.relearning is None or self.higher == "either":
            return None
        return harmonic_mean([max(0.0, 2 * self.auc - 1), self.four_bits, self.relearning])


@dataclass(frozen=True)
class MetaEvaluation:
    """Every measurement, the most faithful first, as ``meta.json`` holds it."""

    concept: str
    knowing: tuple[str, ...]
    unknowing: tuple[str, ...]
    edited: tuple[str, ...]
    steps: int
    seed: int
    measurements: tuple[Judged, ...]
    left_out: tuple[str, ...]
    """Measurements that some model gave no value for."""
    command: str

    def as_json(self) -> dict[str, Any]:
        """What ``excise meta --json`` prints."""
        rows = [{**asdict(one), "overall": one.overall} for one in self.measurements]
        return {**asdict(self), "measurements": rows}


@dataclass(frozen=True)
class MetaJob:
    """A checked request."""

    knowing: tuple[ModelSource, ...]
    unknowing: tuple[ModelSource, ...]
    edited: tuple[ModelSource, ...]
    concept: Concept
    settings: EvalSettings
    steps: int
    seed: int
    device: torch.device
    dtype: torch.dtype
    facts: Facts
    """What group T and V state; relearning reads those of T."""
    command: str
    """What makes the same figures again."""


def prepare(
    knowing: Sequence[str],
    unknowing: Sequence[str],
    edited: Sequence[str],
    concept: str,
    *,
    questions: int = 0,
    steps: int = STEPS,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
) -> MetaJob:
    """Check a request before any weight is read.

    Raises:
        RequestError: A pool has fewer than two models, a model cannot be found, or the pack has nothing of group T to
            relearn from.
    """
    for pool, models in (("knows", knowing), ("never", unknowing)):
        if len(models) < FEWEST:
            raise RequestError(
                f"--{pool} names {counted(len(models), 'model', 'models')}; give at least {FEWEST}, of which it is known, because a"
                " measurement that is to tell them apart needs several of each kind"
            )
    pack = load_concept(concept)
    if pack.about.kind != "knowledge":
        raise RequestError(
            f"concept {pack.ref} is of kind {pack.about.kind}; meta-evaluation asks for what models know, so give a"
            " knowledge pack"
        )
    pools = [tuple(find_model(name) for name in pool) for pool in (knowing, unknowing, edited)]
    chosen = choose_device(device)
    computed = choose_dtype(dtype, chosen)
    for source in {source.folder: source for pool in pools for source in pool}.values():
        check_loadable(open_checkpoint(source.folder), chosen, computed)
    both = {source.folder for source in pools[0]} & {source.folder for source in pools[1]}
    if both:
        raise RequestError("a model stands in --knows and in --never; it can only be one of them")
    facts = find_facts(pack)
    if edited and not without_gaps((RELEARNS_AS,), pack, _held_out(pack), facts)[0]:
        raise RequestError(
            f"concept {pack.ref} has nothing of group T to relearn from; add questions or texts of group T, or leave out"
            " --edited"
        )
    typed = dict(zip(POOLS, (knowing, unknowing, edited), strict=True))
    words = _command({flag: (typed[flag], pool) for flag, pool in zip(POOLS, pools, strict=True)}, concept, pack)
    again = f"{words} --questions {questions} --steps {steps} --seed {seed}"
    again += f" --dtype {dtype}" if dtype != "auto" else ""
    settings = EvalSettings(questions=questions)
    return MetaJob(pools[0], pools[1], pools[2], pack, settings, steps, seed, chosen, computed, facts, again)


def run(job: MetaJob, events: Events) -> MetaEvaluation:
    """Measure every model, and the edited ones also rounded and relearned; what an earlier call measured is taken over.

    Raises:
        RequestError: No measurement has a value for every model.
    """
    measured = [[_values(job, source, events) for source in pool] for pool in (job.knowing, job.unknowing)]
    edited = [_values(job, source, events, ROUNDED, RELEARNED) for source in job.edited]
    taught = _values(job, job.unknowing[0], events, RELEARNED) if job.edited else None
    everyone = [one[state] for pool in (*measured, edited) for one in pool for state in one]
    shared = set.intersection(*(set(values) for values in everyone))
    every = dict.fromkeys(key for values in everyone for key in values)
    if not shared:
        raise RequestError(f"no measurement of concept {job.concept.ref} has a value for every model; add to the pack")
    judged = [_judged(key, measured, edited, taught) for key in every if key in shared]
    return MetaEvaluation(
        job.concept.ref,
        _addresses(job.knowing),
        _addresses(job.unknowing),
        _addresses(job.edited),
        job.steps,
        job.seed,
        tuple(sorted(judged, key=lambda one: (-one.auc, -(one.overall or 0.0), one.name, one.split))),
        tuple(f"{name} ({split})" for name, split in every if (name, split) not in shared),
        job.command,
    )


def write(found: MetaEvaluation, out: Path) -> None:
    """Write ``meta.json`` into a new folder."""
    with staged_folder(out) as staging:
        (staging / "meta.json").write_text(json.dumps(found.as_json(), indent=1) + "\n", encoding="utf-8")


def _command(pools: Mapping[str, tuple[Sequence[str], Sequence[ModelSource]]], typed: str, pack: Concept) -> str:
    """Models and pack as the user may name them again: paths relative to where the command ran."""
    models = [
        word
        for flag, (names, sources) in pools.items()
        for name, source in zip(names, sources, strict=True)
        for word in (f"--{flag}", pasted(source, name))
    ]
    return shlex.join(["excise", "meta", *models, "--concept", relative(typed) or pack.ref])


States = Mapping[str, Measured]


def _judged(key: Key, measured: Sequence[Sequence[States]], edited: Sequence[States], taught: States | None) -> Judged:
    row = measured[0][0][UNTOUCHED][key]
    knowing, unknowing = ([one[UNTOUCHED][key].value() for one in pool] for pool in measured)
    four_bits = relearning = None
    if edited and taught is not None:
        changes = [{state: scores[key].value() for state, scores in one.items()} for one in edited]
        four_bits = _mean([steadiness(one[UNTOUCHED], one[ROUNDED]) for one in changes])
        lesson = taught[RELEARNED][key].value() - taught[UNTOUCHED][key].value()
        relearning = _mean([same_gain(one[RELEARNED] - one[UNTOUCHED], lesson) for one in changes])
    # What an edit should raise is low where the knowledge is.
    higher = {"higher": "never", "lower": "knows"}.get(row.better, "either")
    right = auc(unknowing, knowing) if higher == "never" else auc(knowing, unknowing)
    interval = auc_interval(right, len(knowing), len(unknowing))
    return Judged(*key, row.unit, _mean(knowing), _mean(unknowing), higher, right, interval, four_bits, relearning)


def _addresses(pool: Sequence[ModelSource]) -> tuple[str, ...]:
    return tuple(source.address for source in pool)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _values(job: MetaJob, source: ModelSource, events: Events, *states: str) -> dict[str, Measured]:
    """What a model scores untouched, and in further states."""
    found = {state: _kept(job, source, state) for state in (UNTOUCHED, *states)}
    missing = [state for state, scores in found.items() if scores is None]
    if missing:
        with events.stage(f"load {source.name}"):
            loaded = load_model(source, job.device, job.dtype)
        for state in missing:
            with _in_state(job, loaded, state, events):
                found[state] = _measured(job, source, loaded, state, events)
    return {
        state: {(one.name, one.split): one for one in scores or [] if not one.is_empty}
        for state, scores in found.items()
    }


def _measured(job: MetaJob, source: ModelSource, loaded: LoadedModel, state: str, events: Events) -> list[Scores]:
    with events.stage(f"measure {source.name}, {state}", workload(job.concept, job.settings)) as stage:
        subject = ModelUnderTest(loaded.model, loaded.tokenizer, job.concept, job.settings, None, stage.advance)
        with packing(subject.model):
            scores = measure(subject)
    words = torch.frombuffer(bytearray(_SCORES.dump_json(scores)), dtype=torch.uint8)
    _cache(job, source).put({_WORDS: words}, *_key(job, state))
    return scores


def _kept(job: MetaJob, source: ModelSource, state: str) -> list[Scores] | None:
    """What an earlier call measured; None where none did, or what it left cannot be read."""
    tensors = _cache(job, source).get(*_key(job, state))
    if tensors is None:
        return None
    try:
        return _SCORES.validate_json(bytes(tensors[_WORDS].numpy()))
    except (KeyError, ValidationError):
        return None


def _cache(job: MetaJob, source: ModelSource) -> TensorCache:
    scope = (scope_of(source.folder, job.dtype, job.device), job.concept.sha256, job.settings, code_digest(COMPUTES))
    return TensorCache(cache_folder() / "meta", repr(scope))


def _key(job: MetaJob, state: str) -> tuple[object, ...]:
    return (state, job.steps, job.seed) if state == RELEARNED else (state,)


@contextmanager
def _in_state(job: MetaJob, loaded: LoadedModel, state: str, events: Events) -> Iterator[None]:
    """The model rounded, or taught group T, while this lasts; afterwards it is what it was."""
    if state == UNTOUCHED:
        yield
    elif state == ROUNDED:
        with rounded_weights(loaded.model, BITS) as changed:
            if not changed:
                raise EditError(f"rounding to {BITS} bits changed no weight of the model, so it shows nothing")
            yield
    else:
        with events.stage("relearn from group T", job.steps) as stage, _taught(job, loaded, stage):
            yield


@contextmanager
def _taught(job: MetaJob, loaded: LoadedModel, stage: Stage) -> Iterator[None]:
    data = AttackData(job.concept, job.facts, _held_out(job.concept), loaded.tokenizer, job.seed)
    rows = data.reading_order("T", job.steps * BATCH, str(job.seed))
    schedule = Schedule(job.steps, BATCH, RATE, job.seed, decay="constant", beta2=0.999, shuffled=False, save_every=0)
    with low_rank(loaded.model, [job.seed]) as adapters, TemporaryDirectory() as folder:
        groups = [Group(adapters.owned[0], RATE)]
        fit(loaded.model, rows, stage, Path(folder), _likelihood, schedule, _counted, groups)
        loaded.model.eval()
        yield


def _held_out(pack: Concept) -> tuple[Question, ...]:
    return tuple(question for question in pack.questions if question.split == "forget" and question.group == "V")


def _likelihood(model: torch.nn.Module, batch: dict[str, Any]) -> Terms:
    return {"facts": scored_nats(model, batch).mean()}


def _counted(rows: Sequence[Any]) -> dict[str, Any]:
    batch = example_batch(rows)
    return {**batch, COUNTS: {"facts": len(batch["tokens"])}}
