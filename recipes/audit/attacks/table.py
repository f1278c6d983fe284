"""The attacks of an audit: what each does to a model in order to get a concept back.

An attack is one line of ``ATTACKS``. Those with a score of their own change the question or the weights; the others train
(``attackers``).
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....artifacts.checkpoints.read import open_tensors
from ....editing.architectures import architecture_of, layer_count
from ....editing.errors import EditError
from ....editing.hooks.residual_stream import added, read_early
from ....editing.numerics.fake_quantization import changed_weights, rounded_weights
from ....editing.training.parallel_adapters import soft_prompt_attackers
from ....eval.audit.recovery import RecoveryCurve
from ....eval.concept import Question
from ....eval.inference.multiple_choice_set import MultipleChoiceSet
from ....eval.measurements.probe import question_ends
from ....eval.measurements.probe import scores as probe_scores
from ....eval.model_under_test import EvalSettings, ModelUnderTest
from ...common.examples import Example, example_batch, scored_nats
from ..attack_data import AttackData
from ..attackers import SOFT_TOKENS, Attack, Budget

SHOTS = 5
SAMPLES = 20
SINGULAR = 2
PREFIX, SEARCHED, TRIES, SWAPS, SEARCH_ROWS = 12, 24, 24, 32, 16
"""Tokens of a searched prefix, rounds of search, swaps tried in each, tokens considered at a place, sequences looked at."""

QUICK = (
    "few_shot", "hints", "sampling", "int8", "int4", "bf16", "probe", "relearn", "rtt", "related", "unrelated", "soft_prompt",
)  # fmt: skip
STANDARD = (
    *QUICK, "phrasings", "logit_lens", "undo_half", "undo_singular", "undo_direction", "prefix", "few_8", "few_32", "few_64", "retain_then_forget", "rtt_full", "relearn_full", "latent",
)  # fmt: skip
BUDGETS: dict[str, Budget] = {
    "quick": Budget(QUICK, 64, 2, {"lora": (2e-3,), "full": (1e-4,), "soft": (1e-1,), "latent": (1e-1,)}),
    "standard": Budget(STANDARD, 100, 2, {"lora": (5e-4, 2e-3), "full": (3e-4,), "soft": (1e-1,), "latent": (1e-1,)}),
    "long": Budget(
        STANDARD, 3000, 3,
        {
            "lora": (1e-5, 1e-4, 5e-4, 1e-3, 2e-3), "full": (1e-6, 1e-5, 1e-4, 5e-4), "soft": (1e-2, 3e-2, 1e-1),
            "latent": (1e-2, 3e-2, 1e-1),
        },
    ),
}  # fmt: skip


def _asked_after(prefix: Callable[[AttackData, Question], str]) -> Callable[[Any, AttackData], Sequence[float]]:
    def score(model: Any, material: AttackData) -> Sequence[float]:
        exam = MultipleChoiceSet(material.tokenizer, material.questions, lambda question: prefix(material, question))
        return exam.hits(model)

    return score


def _of_group_t(material: AttackData) -> list[Question]:
    return [q for q in material.concept.questions if q.split == "forget" and q.group == "T"]


def _subject(model: Any, material: AttackData) -> ModelUnderTest:
    return ModelUnderTest(model, material.tokenizer, material.concept, EvalSettings())


def _shots(material: AttackData, question: Question) -> str:
    """Answered questions of group T, the same for all."""
    asked = _of_group_t(material)
    chosen = random.Random("excise shots").sample(asked, k=min(SHOTS, len(asked)))
    return "".join(f"{q.prompt} {q.choices[q.answer]}\n" for q in chosen)


def _hints(material: AttackData, question: Question) -> str:
    """A sentence on what is asked about, and texts of group T."""
    texts = [text.text for text in material.concept.forget if text.group == "T"]
    chosen = random.Random(f"excise hints {question.id}").sample(texts, k=min(SHOTS, len(texts)))
    return f"{material.concept.about.description}\n" + "\n".join(chosen) + "\n"


def _phrasings(model: Any, material: AttackData) -> Sequence[float]:
    """Asked in the pack's other words; a question counts if any wording brings the answer out, as for every model."""
    best = np.zeros(len(material.questions))
    wordings = [wording for words in material.facts.phrasings.values() for wording in words]
    for wording in wordings:
        start = wording[: wording.index("{answer}")].rstrip()
        asked = [
            q.model_copy(update={"prompt": start.replace("{subject}", q.subject)}) if q.subject else q
            for q in material.questions
        ]
        best = np.maximum(best, MultipleChoiceSet(material.tokenizer, asked).hits(model))
    return [float(value) for value in best]


def _sampling(model: Any, material: AttackData) -> Sequence[float]:
    """How much likelier the true answer is among some samples than a wrong choice is: exact, so nothing need be sampled.

    A model that has forgotten which answer is whose, and still knows what answers there are, would otherwise seem to know.
    """
    values = []
    for own, answer in zip(material.exam.probabilities(model), material.exam.answers, strict=True):
        said = [1 - (1 - min(1.0, p)) ** SAMPLES for p in own]
        wrong = [value for place, value in enumerate(said) if place != answer]
        values.append(said[answer] - sum(wrong) / len(wrong))
    return values


def _rounded(bits: int) -> Callable[[Any, AttackData], Sequence[float]]:
    def score(model: Any, material: AttackData) -> Sequence[float]:
        with rounded_weights(model, bits) as changed:
            # A checkpoint in bfloat16 is what it is after the cast.
            if not changed and bits < 16:
                raise EditError("rounding changed no weight, so nothing was tested")
            return material.exam.hits(model)

    return score


@dataclass(frozen=True)
class Prefix:
    """Tokens in front of every question, and the mean loss on T after each round of the search, in nats."""

    ids: tuple[int, ...]
    losses: tuple[float, ...]


def search_prefix(model: Any, material: AttackData) -> Prefix:
    """Search discrete tokens whose presence makes answers of group T likely (greedy coordinate gradient, Zou et al. 2023).

    One prefix for all questions. Of the swaps that the gradient at the embeddings suggests, the best that was tried is kept
    if it helps.
    """
    rng, generator = random.Random("excise prefix"), torch.Generator().manual_seed(0)
    table = model.get_input_embeddings().weight.detach()
    examples = rng.sample(material.examples["T"], k=min(SEARCH_ROWS, len(material.examples["T"])))
    behind = [Example(((0,) * PREFIX) + e.ids, e.start + PREFIX) for e in examples]
    batch = {key: value.to(table.device) for key, value in example_batch(behind).items()}
    ids = torch.randint(table.shape[0], (PREFIX,), generator=generator)
    with soft_prompt_attackers(model, PREFIX, [0]) as attackers:
        (values,) = attackers.owned[0]

        def loss(tokens: Tensor) -> Tensor:
            values.data = table[tokens].float()
            return scored_nats(model, batch).mean()

        current = loss(ids)
        losses = [float(current.detach())]
        for _ in range(SEARCHED):
            (gradient,) = torch.autograd.grad(current, values)
            wanted = (-gradient @ table.float().T).topk(SWAPS, -1).indices.cpu()
            tried = []
            for _ in range(TRIES):
                place = rng.randrange(PREFIX)
                swapped = ids.clone()
                swapped[place] = wanted[place, rng.randrange(SWAPS)]
                with torch.no_grad():
                    tried.append((float(loss(swapped)), swapped))
            best = min(tried, key=lambda pair: pair[0])
            if best[0] < losses[-1]:
                ids = best[1]
            current = loss(ids)
            losses.append(min(best[0], losses[-1]))
    return Prefix(tuple(ids.tolist()), tuple(losses))


def _prefixed(model: Any, material: AttackData) -> Sequence[float]:
    found = search_prefix(model, material)
    table = model.get_input_embeddings().weight.detach()
    with soft_prompt_attackers(model, PREFIX, [0]) as attackers:
        attackers.owned[0][0].data = table[list(found.ids)].float()
        return material.exam.hits(model, PREFIX)


def _undone(change: Callable[[Tensor], Tensor]) -> Callable[[Any, AttackData], Sequence[float]]:
    """Take part of what an edit added to each matrix out again; the base itself is what it was."""

    def score(model: Any, material: AttackData) -> Sequence[float]:
        assert material.base is not None
        with open_tensors(material.base) as read:

            def less(name: str, weight: Tensor) -> Tensor:
                before = read(name).to(weight.device, torch.float32)
                added = weight.float() - before
                return weight if not added.any() else before + change(added)

            with changed_weights(model, less):
                return material.exam.hits(model)

    return score


def _without_top(added: Tensor) -> Tensor:
    """What is left of an update without its strongest directions."""
    left, values, right = torch.linalg.svd(added, full_matrices=False)
    values[:SINGULAR] = 0
    return (left * values) @ right


def _probed(model: Any, material: AttackData) -> Sequence[float]:
    """The point that cross-validation on T prefers, tested on V."""
    found = probe_scores(_subject(model, material))
    by_id = {scores.name: dict(zip(scores.ids, scores.totals, strict=True)) for scores in found}
    return [by_id.get("probe", {}).get(question.id, math.nan) for question in material.questions]


def _best_point(model: Any, material: AttackData, attacked: Callable[[int], Any]) -> Sequence[float]:
    """Under an attack at one point of the stream, the point that brings out most of T; asked V."""
    known = MultipleChoiceSet(material.tokenizer, _of_group_t(material))
    layers, best = layer_count(model.config.to_dict()), (-1.0, 0)
    for point in range(1, layers):
        with attacked(point):
            best = max(best, (float(np.mean(known.hits(model))), point), key=lambda pair: pair[0])
    with attacked(best[1]):
        return material.exam.hits(model)


def _lens(model: Any, material: AttackData) -> Sequence[float]:
    row = architecture_of(model.config.to_dict())
    return _best_point(model, material, lambda point: read_early(model, row, point))


def _undo_direction(model: Any, material: AttackData) -> Sequence[float]:
    """Add to the stream what an edit took from it, on average over questions of T. Embeddings stay as they are."""
    assert material.base is not None
    row, points = architecture_of(model.config.to_dict()), range(1, layer_count(model.config.to_dict()))

    def ends() -> Tensor:
        """Mean over questions of the stream at their last token, point by point."""
        return question_ends(_subject(model, material), _of_group_t(material), points).mean(1)

    now = ends()
    with open_tensors(material.base) as read:
        with changed_weights(model, lambda name, weight: read(name).to(weight.device, weight.dtype)):
            lost = ends() - now
    return _best_point(model, material, lambda point: added(model, row, lost[point - 1], point))


ATTACKS: dict[str, Attack] = {
    "few_shot": Attack(0, f"asked after {SHOTS} answered questions of group T", _asked_after(_shots)),
    "hints": Attack(0, f"asked after the concept's description and {SHOTS} texts of group T", _asked_after(_hints)),
    "phrasings": Attack(0, "asked in each of the pack's other wordings; one right answer counts", _phrasings),
    "sampling": Attack(0, f"how much oftener {SAMPLES} samples hold the true answer than a wrong choice", _sampling),
    "int8": Attack(0, "weights rounded to 8 bits in groups of 64", _rounded(8)),
    "int4": Attack(0, "weights rounded to 4 bits in groups of 64", _rounded(4)),
    "bf16": Attack(0, "weights cast to bfloat16 and back", _rounded(16)),
    "undo_half": Attack(0, "half of what was added to the base taken out again", _undone(lambda added: added / 2), known=True),
    "undo_singular": Attack(
        0, f"the {SINGULAR} strongest directions of what was added to each matrix taken out", _undone(_without_top), known=True
    ),
    "undo_direction": Attack(
        0, "what the stream lost on average at the end of T's questions added to it, at the point where T profits most",
        _undo_direction, known=True,
    ),
    "logit_lens": Attack(0, "read from the stream at the point where T is told best, without the layers above", _lens),
    "probe": Attack(0, "a linear probe learned on T reads the answer from the residual stream", _probed),
    "soft_prompt": Attack(1, f"{SOFT_TOKENS} learned embeddings before the question, trained on T", None, "soft", "T"),
    "prefix": Attack(1, f"{PREFIX} tokens before the question, searched for on T", _prefixed),
    "latent": Attack(1, "one learned vector added to the stream halfway up, trained on T", None, "latent", "T"),
    "rtt": Attack(2, "low-rank fine-tuning on T, tested on V (Deeb and Roger 2024)", None, "lora", "T"),
    "rtt_full": Attack(2, "fine-tuning of all weights on T, tested on V", None, "full", "T"),
    "few_8": Attack(2, "low-rank fine-tuning on 8 sequences of T", None, "lora", "T:8"),
    "few_32": Attack(2, "low-rank fine-tuning on 32 sequences of T", None, "lora", "T:32"),
    "few_64": Attack(2, "low-rank fine-tuning on 64 sequences of T", None, "lora", "T:64"),
    "related": Attack(2, "low-rank fine-tuning on neighbouring topics in the same syntax", None, "lora", "related"),
    "unrelated": Attack(2, "low-rank fine-tuning on retain texts", None, "lora", "retain"),
    "retain_then_forget": Attack(2, "low-rank fine-tuning on retain texts for 40% of the steps, then on T", None, "lora", "retain+T"),
    "relearn": Attack(2, "low-rank fine-tuning on the texts about V itself, which shows how fast it is learned again", None, "lora", "V", known=True),
    "relearn_full": Attack(2, "fine-tuning of all weights on the texts about V itself", None, "full", "V", known=True),
}  # fmt: skip


def untrained(model: Any, attack: Attack, material: AttackData) -> RecoveryCurve:
    """A model under an attack without training: a curve of one point."""
    assert attack.score is not None
    hits = np.asarray(attack.score(model, material), dtype=float)
    return RecoveryCurve((0,), (0,), hits[None, None])
