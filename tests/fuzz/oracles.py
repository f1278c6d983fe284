"""Functions that compute, held against the definitions in ``oracle/`` on random models, items and settings.

A case is made from its seed alone. It returns the worst difference, as a share of what is allowed: above 1 it fails.
"""

import math
import random
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from excise.artifacts.checkpoints.export import export_edit
from excise.artifacts.checkpoints.read import open_checkpoint
from excise.editing.edits.fake_quantization import GROUP, round_to_nearest
from excise.editing.edits.low_rank import Factors, LowRankUpdate
from excise.editing.edits.projection import make_projection, orthogonalize
from excise.editing.training.edited_target import TargetEdit
from excise.editing.training.soft_targets import keep_top, soft_divergence
from excise.eval.concept import Question
from excise.eval.inference.generation import Reply, divergence, generate, reply_log_probabilities
from excise.eval.inference.likelihood import Request, log_likelihoods
from excise.eval.inference.multiple_choice_set import MultipleChoiceSet
from excise.eval.intervals import tango, wilson
from helpers import PICO, make_pico
from oracle import intervals, language, shards, targets, weights
from transformers import GenerationConfig

MODELS = tuple(sorted(PICO))
WORDS = 96
NATS = 2e-4
"""Difference of a log-probability in float32, of a whole text."""


class Words:
    """A tokenizer of one token a word, with or without begin and end tokens."""

    chat_template = pad_token_id = eos_token_id = None

    def __init__(self, *, begin: bool = False, end: bool = False):
        self.begin, self.end = begin, end

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [int(word) for word in text.split()]
        if add_special_tokens:
            ids = [1] * self.begin + ids + [2] * self.end
        return {"input_ids": ids}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids))


@cache
def _model(name: str) -> Any:
    return make_pico(name)


def _words(rng: random.Random, length: int) -> str:
    return " ".join(str(rng.randrange(3, WORDS)) for _ in range(length))


def _length(rng: random.Random, size: int) -> int:
    return rng.choice((1, 2, rng.randint(1, 6), rng.randint(1, max(1, size))))


def likelihoods(rng: random.Random, size: int) -> float:
    """Texts and continuations, each with the most context that fits."""
    model, tokenizer = _model(rng.choice(MODELS)), Words(begin=rng.random() < 0.5, end=rng.random() < 0.3)
    context = int(getattr(model.config, "max_position_embeddings", 64))
    requests = []
    for _ in range(rng.randint(1, 5)):
        prompt = _words(rng, _length(rng, size)) if rng.random() < 0.7 else ""
        requests.append(Request(prompt, " " + _words(rng, _length(rng, size))))
    if rng.random() < 0.3:
        # A text that another one begins with.
        requests.append(Request(requests[0].prompt, requests[0].continuation + " 7 8"))
    found, worst = log_likelihoods(model, tokenizer, requests), 0.0
    for request in requests:
        front = [1] * tokenizer.begin + [int(word) for word in request.prompt.split()]
        ids = [*front, *(int(word) for word in request.continuation.split())]
        start = max(1, len(front))
        got = found[request]
        if got.tokens != max(0, len(ids) - start):
            return math.inf
        if got.tokens and len(ids) <= context + 1:
            wanted = language.log_likelihood(model, ids, start)
            worst = max(worst, abs(got.log_probability - wanted) / (NATS * (1 + abs(wanted) / 20)))
    return worst


SHIPPED = (
    {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}, {"num_beams": 3}, {"suppress_tokens": [5, 6, 7]},
    {"min_new_tokens": 5}, {"do_sample": True, "temperature": 0.3, "top_k": 2}, {"sequence_bias": [[[11], -20.0]]}, {},
)  # fmt: skip


def replies(rng: random.Random, size: int) -> float:
    """Greedy replies are the model's own argmax, whatever its generation_config asks for."""
    model = _model(rng.choice(MODELS))
    before = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=2, **rng.choice(SHIPPED))
    prompts = [_words(rng, _length(rng, size // 2)) for _ in range(rng.randint(1, 4))]
    tokens = rng.randint(1, 5)
    try:
        found = generate(model, Words(), prompts, tokens)
    finally:
        model.generation_config = before
    for prompt, reply in zip(prompts, found, strict=True):
        ids = [int(word) for word in prompt.split()]
        said = list(reply.ids)
        wanted = language.greedy(model, ids, tokens, {2})
        if said != wanted and not _near_tie(model, ids, said, wanted):
            return math.inf
    return 0.0


def _near_tie(model: Any, ids: list[int], said: list[int], wanted: list[int]) -> bool:
    """Whether the replies part where two tokens are equally likely but for rounding."""
    place = next((i for i, (a, b) in enumerate(zip(said, wanted, strict=False)) if a != b), None)
    if place is None:
        return False
    log_p = language.log_probabilities(model, [*ids, *wanted[:place]])
    return abs(log_p[said[place]] - log_p[wanted[place]]) < 1e-4


def reply_divergence(rng: random.Random, size: int) -> float:
    """KL of two models along replies of unlike lengths."""
    one, other = (_model(name) for name in rng.sample([name for name in MODELS if name != "gpt2"], 2))
    rows = [
        [rng.randrange(3, WORDS) for _ in range(rng.randint(2, max(3, size // 2)))] for _ in range(rng.randint(1, 4))
    ]
    cut = [rng.randint(1, len(row) - 1) for row in rows]
    said = [Reply("", tuple(row[:at]), tuple(row[at:]), "") for row, at in zip(rows, cut, strict=True)]
    found = [
        divergence(a, b)
        for a, b in zip(reply_log_probabilities(one, said), reply_log_probabilities(other, said), strict=True)
    ]
    worst = 0.0
    for row, at, got in zip(rows, cut, found, strict=True):
        for place in range(at, len(row)):
            p, q = (language.log_probabilities(model, row[:place]) for model in (one, other))
            wanted = math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
            worst = max(worst, abs(float(got[place - at]) - wanted) / 1e-4)
    return worst


def exam(rng: random.Random, size: int) -> float:
    """Choices of a question, by log-probability per token."""
    model = _model(rng.choice(MODELS))
    questions = []
    for number in range(rng.randint(1, 4)):
        choices = tuple(dict.fromkeys(_words(rng, rng.randint(1, 4)) for _ in range(rng.randint(2, 5))))
        if len(choices) > 1:
            answer = rng.randrange(len(choices))
            prompt = _words(rng, _length(rng, size // 2))
            questions.append(
                Question(id=str(number), split="forget", group="V", prompt=prompt, choices=choices, answer=answer)
            )
    if not questions:
        return 0.0
    asked = MultipleChoiceSet(Words(), questions)
    worst, place = 0.0, 0
    found, hits = asked.log_probabilities(model), asked.hits(model)
    for question, hit in zip(questions, hits, strict=True):
        values = []
        for choice in question.choices:
            front = [int(word) for word in question.prompt.split()]
            ids = [*front, *(int(word) for word in choice.split())]
            wanted = language.log_likelihood(model, ids, len(front))
            worst = max(worst, abs(found[place] - wanted) / NATS)
            values.append(wanted / (len(ids) - len(front)))
            place += 1
        ordered = sorted(values, reverse=True)
        if ordered[0] - ordered[1] > 1e-3 and hit != float(values.index(ordered[0]) == question.answer):
            return math.inf
    return worst


def edited_targets(rng: random.Random, size: int) -> float:
    """ELM's targets at any strength, one-sided or not, cut or not."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    vocabulary = max(2, size)
    streams = [
        (rng.choice((0.3, 3.0)) * torch.randn(1, vocabulary, generator=generator, dtype=torch.float64)).log_softmax(-1)
        for _ in range(3)
    ]
    edit = TargetEdit(
        rng.choice((0.0, 0.5, 1.0, 1.5, 20.0, 500.0)), rng.random() < 0.5, top_k=rng.choice((0, 0, 1, 3, 1000))
    )
    stored = rng.randint(1, vocabulary)
    kept = keep_top(edit.log_p(*streams), stored)
    wanted = targets.edited(
        *(stream[0].tolist() for stream in streams), edit.strength, one_sided=edit.one_sided, top_k=edit.top_k
    )
    differences = [
        abs(float(p.exp()) - wanted[token]) for token, p in zip(kept.ids[0].tolist(), kept.log_p[0], strict=True)
    ]
    rest = math.fsum(wanted) - math.fsum(wanted[token] for token in kept.ids[0].tolist())
    return max(*differences, abs(float(kept.rest[0].exp()) - rest), 0.0) / 1e-7


def soft_losses(rng: random.Random, size: int) -> float:
    """The divergence from stored targets, and its gradient by small differences."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    vocabulary, width, n = rng.randint(3, max(4, size)), 4, rng.randint(1, 4)
    head = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    hidden = torch.randn(n, width, generator=generator, dtype=torch.float64, requires_grad=True)
    whole = (2 * torch.randn(n, vocabulary, generator=generator, dtype=torch.float64)).log_softmax(-1)
    kept = keep_top(whole, rng.randint(1, vocabulary))

    def wanted(states: torch.Tensor) -> list[float]:
        logits = (states @ head.T).tolist()
        return [targets.divergence(whole[row].exp().tolist(), logits[row], kept.ids[row].tolist()) for row in range(n)]

    found = soft_divergence(hidden, lambda states: states @ head.T, kept)
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    worst = max(abs(a - b) for a, b in zip(found.tolist(), wanted(hidden.detach()), strict=True)) / 1e-7
    row, column, step = rng.randrange(n), rng.randrange(width), 1e-6
    moved = [hidden.detach().clone() for _ in range(2)]
    moved[0][row, column] += step
    moved[1][row, column] -= step
    slope = (sum(wanted(moved[0])) - sum(wanted(moved[1]))) / (2 * step)
    return max(worst, abs(float(gradient[row, column]) - slope) / 1e-6)


def projections(rng: random.Random, size: int) -> float:
    """A subspace taken out of a weight, behind a gain or not."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    d = rng.randint(2, max(3, size))
    basis = torch.linalg.qr(torch.randn(d, rng.randint(1, min(d, 3)), generator=generator)).Q
    weight = torch.randn(d, rng.randint(1, 9), generator=generator)
    gain = 0.5 + torch.rand(d, generator=generator) if rng.random() < 0.5 else None
    strength = rng.choice((0.01, 0.5, 1.0))
    found = orthogonalize(weight, make_projection(basis, strength, gain))
    return float((found.double() - weights.without_subspace(weight, basis, strength, gain)).abs().max()) / 1e-4


def roundings(rng: random.Random, size: int) -> float:
    """Weights as low-bit inference rounds them; a value halfway between two may go either way."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    columns = rng.choice((rng.randint(1, max(2, size)), GROUP, 2 * GROUP))
    shape = (rng.randint(1, 4), columns) if rng.random() < 0.7 else (2, rng.randint(1, 3), columns)
    weight = rng.choice((1e-4, 1.0, 30.0)) * torch.randn(shape, generator=generator)
    bits = rng.choice((4, 8))
    found, wanted = round_to_nearest(weight, bits).double(), weights.rounded(weight, bits, GROUP)
    step = wanted.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    # Where float32 and float64 round apart, both are as near to the weight.
    far = ((found - weight.double()).abs() - (wanted - weight.double()).abs()).abs()
    return float((far / step.clamp_min(1e-30)).max()) / 1e-4


def exported_shards(rng: random.Random, size: int) -> float:
    """A low-rank update on disk: W + left right rounded once where it is declared, and the base's bytes elsewhere."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    name, dtype = rng.choice(("llama", "qwen3", "gpt2", "opt")), rng.choice((torch.float32, torch.bfloat16))
    with tempfile.TemporaryDirectory(prefix="excise-oracle-") as place:
        base, edited = Path(place) / "base", Path(place) / "edited"
        edited.mkdir()
        model = make_pico(name, dtype)
        model.save_pretrained(base, max_shard_size=rng.choice(("40KB", "1GB")))
        matrices = {
            key: shape
            for key, (_, shape, _) in shards.stored(base).items()
            if re.search(r"\.[01]\.", key) and len(shape) == 2
        }
        rank = rng.randint(1, min(4, size))
        factors = {
            key: tuple(0.1 * torch.randn(*shape, generator=generator) for shape in ((rows, rank), (rank, columns)))
            for key, (rows, columns) in rng.sample(sorted(matrices.items()), rng.randint(1, 3))
        }
        config = model.config
        update = LowRankUpdate(
            {key: Factors(*pair) for key, pair in factors.items()},
            config.model_type,
            config.hidden_size,
            config.num_hidden_layers,
        )
        export_edit(update, open_checkpoint(base), edited)
        return shards.worst_of_update(base, edited, factors) / 1.001


def paired_rates(rng: random.Random, size: int) -> float:
    """Tango's limits against a search for them."""
    n = rng.randint(1, 8 * size)
    gained = rng.randint(0, n)
    lost = rng.randint(0, n - gained)
    found, wanted = tango(gained, lost, n), intervals.paired_rate_interval(gained, lost, n)
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True)) / 1e-5


def single_rates(rng: random.Random, size: int) -> float:
    """Wilson's limits are where the score test turns: (p - rate)^2 = z^2 rate (1 - rate) / n."""
    n = rng.randint(1, 20 * size)
    right = rng.randint(0, n)
    worst = 0.0
    for limit in wilson(right, n):
        if 0 < limit < 1:
            worst = max(worst, abs(abs(right / n - limit) / math.sqrt(limit * (1 - limit) / n) - 1.959964) / 1e-4)
    return worst


ORACLES: dict[str, Callable[[random.Random, int], float]] = {
    "likelihoods": likelihoods,
    "replies": replies,
    "reply_divergence": reply_divergence,
    "exam": exam,
    "edited_targets": edited_targets,
    "soft_losses": soft_losses,
    "projections": projections,
    "roundings": roundings,
    "exported_shards": exported_shards,
    "paired_rates": paired_rates,
    "single_rates": single_rates,
}
SIZES = (24, 12, 6, 3)
"""Largest lengths of a case; what fails is tried again with smaller ones."""


def worst_of(name: str, seed: int, size: int = SIZES[0]) -> float:
    """The worst difference of one case; an error counts as infinite."""
    return ORACLES[name](random.Random(f"{name} {seed}"), size)
