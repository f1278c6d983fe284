"""Where a model computes a pack's facts: causal tracing and attribution patching, layer by layer and site by site."""

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..artifacts.checkpoints.read import open_checkpoint
from ..artifacts.checkpoints.staging import refuse_existing, staged_folder
from ..artifacts.concepts import load_concept
from ..artifacts.events import Events
from ..artifacts.models.find import find_model
from ..artifacts.models.load import choose_device, choose_dtype, load_model
from ..artifacts.models.source import ModelSource
from ..artifacts.reporting import charts
from ..editing.architectures import architecture_of, layer_count
from ..editing.errors import RequestError, counted
from ..editing.hooks.patching import STREAM
from ..editing.hooks.unit_scores import rank_correlation
from ..eval.concept import Concept
from ..eval.localization import (
    GROUPS,
    Effect,
    Pair,
    attribution,
    by_layer,
    exact,
    known,
    window,
)
from .common.examples import spread
from .common.tokens import Row, encode
from .data.facts import Context, Fact, Facts, fact_contexts, find_facts

FACTS, CHECKED = 128, 16
"""Facts to trace, at most, and of those the ones that exact patching checks: it takes a forward a site and group."""
FEWEST = 5
"""Facts below which an average says nothing."""


@dataclass(frozen=True)
class Localized:
    """Where facts are computed, as ``localize.json`` holds it."""

    model: dict[str, Any]
    concept: dict[str, Any]
    seed: int
    layers: int
    facts: int
    """Facts that were traced."""
    no_partner: int
    """Facts left out: no other subject has a name of as many tokens and another answer."""
    unknown: int
    """Facts left out: the model prefers the other subject's answer, so there is nothing to trace."""
    attributed: tuple[Effect, ...]
    """Estimated share of the answer that each site restores (attribution patching)."""
    checked: int
    """Facts on which patching was exact."""
    restored: tuple[Effect, ...]
    """Exact: share that each site restores alone (causal tracing)."""
    removed: tuple[Effect, ...]
    """Exact: share that is lost without each site."""
    agreement: dict[str, float]
    """Spearman's rank correlation of the estimates with both, over sublayers and positions."""
    window: tuple[int, int]
    """First and last of the fewest layers whose sublayers restore 80% of what all do."""

    def by_layer(self) -> list[float]:
        """What each layer's sublayers restore by the estimates, summed over positions."""
        return by_layer(self.attributed, self.layers)


@dataclass(frozen=True)
class LocalizeJob:
    """A checked request."""

    source: ModelSource
    concept: Concept
    facts: Facts
    layers: int
    count: int
    checked: int
    seed: int


def prepare(model: str, concept: str, *, facts: int = FACTS, checked: int = CHECKED, seed: int = 0) -> LocalizeJob:
    """Check a request before any weight is read.

    Raises:
        RequestError: The pack states no facts about several subjects.
    """
    source = find_model(model)
    config = open_checkpoint(source.folder).config
    architecture_of(config)
    pack = load_concept(concept)
    stated = find_facts(pack)
    if len({fact.subject for fact in stated.facts}) < 2:
        raise RequestError(
            f"concept {pack.ref} states no facts to trace: tracing compares subjects; give a knowledge pack whose "
            "group-T questions name their subject"
        )
    return LocalizeJob(source, pack, stated, layer_count(config), facts, checked, seed)


def run(job: LocalizeJob, events: Events, device: str = "auto", dtype: str = "auto") -> Localized:
    """Trace the facts that the model knows.

    Raises:
        RequestError: Fewer than five facts can be traced.
    """
    chosen = choose_device(device)
    with events.stage("load model"):
        loaded = load_model(job.source, chosen, choose_dtype(dtype, chosen))
    model, row = loaded.model, architecture_of(loaded.model.config.to_dict())
    pairs, alone = pairs_of(job.facts, loaded.tokenizer, job.seed, job.count)
    with events.stage("find facts that the model knows"):
        some = known(model, pairs)
    unknown = len(pairs) - len(some)
    if len(some) < FEWEST:
        raise RequestError(
            f"only {counted(len(some), 'fact', 'facts')} of concept {job.concept.ref} can be traced, and at least "
            f"{FEWEST} are needed: for {alone} no other subject's name has as many tokens and another answer, and the "
            f"model does not know {unknown}; give a pack with more subjects, or a model that knows them"
        )
    with events.stage("attribution patching", len(some)) as stage:
        attributed = attribution(model, row, some, stage.advance)
    few = some[: job.checked]
    with events.stage("exact patching", 2 * len(few)) as stage:
        restored = exact(model, row, few, advance=stage.advance) if few else []
        removed = exact(model, row, few, remove=True, advance=stage.advance) if few else []
    return Localized(
        job.source.describe(),
        {"ref": job.concept.ref, "sha256": job.concept.sha256},
        job.seed,
        job.layers,
        len(some),
        alone,
        unknown,
        tuple(attributed),
        len(few),
        tuple(restored),
        tuple(removed),
        {
            name: _agreement(attributed, effects)
            for name, effects in (("restored", restored), ("removed", removed))
            if effects
        },
        window(attributed, job.layers),
    )


def write(found: Localized, out: Path) -> None:
    """Write ``localize.json`` and ``localize.svg`` into a new folder."""
    refuse_existing(out)
    with staged_folder(out) as staging:
        (staging / "localize.json").write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
        (staging / "localize.svg").write_text(charts.svg_file(charts.localized(*grids(found))), encoding="utf-8")


def sentences(found: Localized) -> list[str]:
    """What a reader must know beside the numbers."""
    first, last = found.window
    held = sum(found.by_layer()[first : last + 1]) / (sum(found.by_layer()) or 1.0)
    left_out = {
        "no other subject's name has as many tokens and another answer": found.no_partner,
        "the model prefers the other subject's answer": found.unknown,
    }
    said = [f"{counted(found.facts, 'fact', 'facts')} traced"]
    said += [f"{counted(n, 'fact', 'facts')} left out: {why}" for why, n in left_out.items() if n]
    said.append(
        f"layers {first} to {last} of {found.layers} hold {held:.0%} of what attention and MLPs restore (estimated)"
    )
    if found.agreement:
        said.append(
            f"exact patching on {counted(found.checked, 'fact', 'facts')}: rank correlation of the estimates with what"
            f" sites restore {found.agreement['restored']:.2f}, with what is lost without them"
            f" {found.agreement['removed']:.2f}"
        )
    exactly = f"restored exactly, n = {found.checked}" if found.restored else f"estimated, n = {found.facts}"
    said.append(
        f"below: share of the answer that is {exactly}; at the subject's tokens (s), between them and the last token (b),"
        " at the last token (l)"
    )
    said.append("where a fact is computed need not be where an edit of it does least harm: measure the edit")
    return said


def grids(found: Localized) -> tuple[dict[str, list[list[float | None]]], list[str]]:
    """Effects layer by layer for each figure, and the names of their columns: a part of the layer and positions."""
    parts = list(dict.fromkeys(effect.site.part for effect in found.attributed))
    columns = [(part, group) for part in parts for group in GROUPS]
    named = {"estimated": found.attributed, "restored": found.restored, "removed": found.removed}
    shown: dict[str, list[list[float | None]]] = {}
    for name, effects in named.items():
        places = {(effect.site.layer, effect.site.part, effect.group): effect.value for effect in effects}
        if effects:
            shown[name] = [[places.get((layer, *column)) for column in columns] for layer in range(found.layers)]
    return shown, [f"{short(part)} {group}" for part, group in columns]


def short(part: str) -> str:
    """A part's name without the word that says that attention is attention."""
    return part.rsplit(".", 1)[-1].replace("self_attn", "attention")


def _agreement(estimated: Sequence[Effect], exactly: Sequence[Effect]) -> float:
    """Rank correlation over the same sublayers and positions."""
    other = {(effect.site, effect.group): effect.value for effect in exactly}
    both = [
        (e.value, other[e.site, e.group]) for e in estimated if e.site.part != STREAM and (e.site, e.group) in other
    ]
    first, second = zip(*both, strict=True)
    return rank_correlation(torch.tensor(first), torch.tensor(second))


def pairs_of(facts: Facts, tokenizer: Any, seed: int, most: int) -> tuple[list[Pair], int]:
    """Pairs of prompts for facts whose subject can be replaced by another of as many tokens, and how many facts cannot.

    A fact is asked in the first phrase of the pack's texts that states it, or by its question.

    Args:
        most: Pairs that are enough; facts are taken in an order drawn by the seed.
    """
    rng = random.Random(f"excise localize {seed}")
    asked: dict[Fact, Context] = {}
    for kind in ("texts", "questions"):
        for context in fact_contexts(facts, kind, seed):
            assert context.fact is not None
            asked.setdefault(context.fact, context)
    by_relation: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts.facts:
        by_relation[fact.relation].append(fact)
    pairs, alone = list[Pair](), 0
    for fact in spread(list(asked), len(asked), f"excise localize {seed}"):
        if len(pairs) == most:
            break
        others = [other for other in by_relation[fact.relation] if other.answer != fact.answer]
        # Drawn in an order that does not depend on how many there are.
        rng.shuffle(others)
        pair = next((found for other in others if (found := _pair(tokenizer, asked[fact], fact, other))), None)
        alone += pair is None
        pairs += [pair] if pair else []
    return pairs, alone


def _pair(tokenizer: Any, context: Context, fact: Fact, other: Fact) -> Pair | None:
    text = context.replaced(other.subject)
    clean, corrupted = (encode(tokenizer, prompt, context.special) for prompt in (context.text, text))
    places = [place for place, (a, b) in enumerate(zip(clean, corrupted, strict=False)) if a != b]
    if len(clean) != len(corrupted) or not places:
        return None
    answer = _first_token(tokenizer, context.text, fact.answer, clean, context.special)
    different = _first_token(tokenizer, text, other.answer, corrupted, context.special)
    if answer is None or different is None or answer == different:
        return None
    return Pair(clean, corrupted, (places[0], places[-1] + 1), answer, different, fact.subject)


def _first_token(tokenizer: Any, prompt: str, answer: str, ids: Row, special: bool) -> int | None:
    """The token that an answer begins with behind a prompt, or None where the prompt's last token would be another."""
    whole = encode(tokenizer, f"{prompt} {answer}", special)
    return whole[len(ids)] if len(whole) > len(ids) and whole[: len(ids)] == ids else None
