"""How deep an edit erases: what the edited model writes to its residual stream, put into the base, layer by layer.

The base reads a question with its true answer. After one layer, the stream at the positions that predict the answer is
replaced by what another model wrote there, and the answer's log-probability falls by as much as that model lacks up to
that layer. A model that never knew shows how much there is to lack; the edited model's score is the share of it that it
lacks too. Nothing is trained.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from ..editing.hooks.residual_stream import change_output, decoder_layers, read_streams
from ..editing.modules import causal_model, final_hidden, unembedding
from ..editing.wiring.row import Architecture
from .inference.batches import read_in_batches
from .inference.caches import repeats_cache
from .inference.likelihood import batch_budget, pad_right
from .intervals import Interval
from .ratios import ratio_interval

LEAST = 0.05
"""Nats a token that the unknowing model must lack after a layer, so that the layer counts for a question."""
CELLS = 256
"""Distributions that are computed at once."""
Streams = Float[Tensor, "layers answer d"]
"""What a model wrote after each layer at the positions that predict the answer's tokens, on the processor."""


@dataclass(frozen=True)
class Statement:
    """A question with its true answer."""

    ids: tuple[int, ...]
    start: int
    """Place of the answer's first token; at least 1."""
    subject: str
    """By which intervals count."""

    @property
    def tokens(self) -> int:
        """Tokens of the answer."""
        return len(self.ids) - self.start


@dataclass(frozen=True)
class LayerDepth:
    """What one layer's stream lacks, over the questions for which the layer counts."""

    layer: int
    n: int
    unknowing: float | None
    """Nats a token that a model that never knew lacks; None where the layer counts for no question."""
    edited: float | None
    erased: float | None
    """Share of ``unknowing`` that the edited model lacks too, no question counting beyond its own."""


@dataclass(frozen=True)
class DepthScore:
    """The Unlearning Depth Score, with what it is made of."""

    value: float | None
    """0: all of it is still there; 1: as little as in a model that never knew. None where no layer counts."""
    ci95: Interval | None
    n: int
    """Questions for which some layer counts."""
    asked: int
    layers: tuple[LayerDepth, ...]

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@torch.no_grad()
def streams_at_answers(
    model: Any, row: Architecture, statements: Sequence[Statement], advance: Callable[[int], None] = lambda _: None
) -> list[Streams]:
    """What a model writes after each layer where the answers' tokens are predicted, in the statements' order.

    Args:
        model: A causal language model in evaluation mode.
        row: Its architecture.
        advance: Told how many statements were read.

    Raises:
        EditError: A hook did not run, as happens in a compiled model.
    """
    points = range(1, len(decoder_layers(model, row)) + 1)
    found: dict[int, Tensor] = {}

    def read(places: list[int]) -> list[Tensor]:
        inputs = pad_right([statements[place].ids for place in places], model.device)
        streams = read_streams(model, row, inputs, points)
        stacked = torch.stack([streams[point].reshape(*inputs["input_ids"].shape, -1).cpu() for point in points])
        return [stacked[:, at, _predicting(statements[place])].clone() for at, place in enumerate(places)]

    lengths = [len(statement.ids) for statement in statements]
    for places, read_now in read_in_batches(lengths, batch_budget(model), read):
        found |= zip(places, read_now, strict=True)
        advance(len(places))
    return [found[place] for place in range(len(statements))]


@torch.no_grad()
def lacking(
    model: Any,
    row: Architecture,
    statements: Sequence[Statement],
    sources: Sequence[Sequence[Streams]],
    advance: Callable[[int], None] = lambda _: None,
) -> Float[Tensor, "sources statements layers"]:
    """Nats a token by which the true answer falls when one layer's stream is a source's, on the processor, in float64.

    All layers and sources of a statement are rows of one forward, behind one reading of the question where the model's
    cache allows.

    Args:
        model: The base, in evaluation mode.
        row: Its architecture.
        sources: What other models of the same shape wrote, as ``streams_at_answers`` gives it.
        advance: Told how many statements were read.

    Raises:
        ValueError: A source has another number of layers, or another width, than the model.

    Source:
        Lee et al. 2026 (arXiv 2605.24614), section 3, on the positions that predict the answer.
    """
    layers = list(decoder_layers(model, row))
    cached = repeats_cache(model)
    falls = []
    for place, statement in enumerate(statements):
        put = [source[place] for source in sources]
        if any(one.shape[0] != len(layers) for one in put):
            raise ValueError(f"a source has {[len(one) for one in put]} layers; the model has {len(layers)}")
        values = torch.cat(put)
        hidden = _patched(model, layers, statement, values, cached)
        of_answer = _mean_log_p(model, hidden, statement.ids[statement.start :])
        falls.append((of_answer[-1] - of_answer[:-1]).reshape(len(sources), len(layers)))
        advance(1)
    return torch.stack(falls, 1)


def depth_score(
    unknowing: Float[Tensor, "statements layers"], edited: Float[Tensor, "statements layers"], subjects: Sequence[str]
) -> DepthScore:
    """The score from what two models lack, as ``lacking`` gives it, with its interval over subjects.

    Of a question, layers count after which the unknowing model lacks more than ``LEAST`` nats a token; of what it lacks
    there, summed over layers, the score is the share that the edited model lacks too. Questions count alike.

    Example:
        >>> lacks = torch.tensor([[0.0, 1.0, 3.0]])
        >>> depth_score(lacks, torch.tensor([[0.5, 0.5, 4.0]]), ["Ada"]).value
        0.875

    Source:
        Lee et al. 2026 (arXiv 2605.24614), equations 1 to 3.
    """
    counts = unknowing > LEAST
    whole = torch.where(counts, unknowing, 0.0)
    gone = torch.where(counts, edited.clamp(min=0).minimum(unknowing), 0.0)
    kept = [place for place in range(len(whole)) if counts[place].any()]
    scores = [float(gone[place].sum() / whole[place].sum()) for place in kept]
    layers = tuple(
        _layer(number, unknowing[counts[:, number], number], edited[counts[:, number], number], gone[:, number])
        for number in range(unknowing.shape[1])
    )
    interval = ratio_interval(scores, [1.0] * len(scores), [subjects[place] for place in kept]) if kept else None
    value = sum(scores) / len(scores) if scores else None
    return DepthScore(value, interval, len(kept), len(whole), layers)


def _layer(number: int, unknowing: Tensor, edited: Tensor, gone: Tensor) -> LayerDepth:
    if not len(unknowing):
        return LayerDepth(number, 0, None, None, None)
    erased = float(gone.sum() / unknowing.sum())
    return LayerDepth(number, len(unknowing), float(unknowing.mean()), float(edited.mean()), erased)


def _predicting(statement: Statement) -> slice:
    return slice(statement.start - 1, len(statement.ids) - 1)


def _patched(model: Any, layers: Sequence[Any], statement: Statement, values: Tensor, cached: bool) -> Tensor:
    """Final hidden states [rows, answer, d] where the answer is predicted: one row a patch, and the last without one."""
    rows, front = len(values) + 1, statement.start - 1 if cached else 0
    ids = torch.tensor([statement.ids[front:-1]], device=model.device).expand(rows, -1)
    with ExitStack() as hooks:
        cache = _read_before(model, statement.ids[:front], rows) if front else None
        for number, layer in enumerate(layers):
            chosen = list(range(number, len(values), len(layers)))
            hooks.callback(change_output(layer, _putting(chosen, values[chosen], rows)).remove)
        if cache is None:
            return final_hidden(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[
                :, -statement.tokens :
            ]
        places = torch.arange(front, len(statement.ids) - 1, device=model.device).expand(rows, -1)
        output = causal_model(model).base_model(
            input_ids=ids,
            attention_mask=torch.ones(rows, len(statement.ids) - 1, dtype=torch.long, device=model.device),
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
        )
    return output.last_hidden_state.to(ids.device)


def _mean_log_p(model: Any, hidden: Tensor, answer: Sequence[int]) -> Float[Tensor, " rows"]:
    """Mean log-probability of the answer's tokens in each row, in nats, in float64 on the processor."""
    targets = torch.tensor(answer, device=hidden.device)
    means = []
    # Distributions of all rows at once would be large where the answer is long.
    for some in hidden.split(max(1, CELLS // len(answer))):
        log_p = unembedding(model)(some).float().log_softmax(-1)
        chosen = log_p.gather(-1, targets.expand(len(some), -1)[..., None])[..., 0]
        means.append(chosen.cpu().double().mean(-1))
    return torch.cat(means)


def _read_before(model: Any, ids: Sequence[int], rows: int) -> DynamicCache:
    """A cache of the question for so many rows; read once."""
    decoder = causal_model(model).base_model
    cache = DynamicCache(config=decoder.config)
    inputs = torch.tensor([list(ids)], device=model.device)
    decoder(input_ids=inputs, attention_mask=torch.ones_like(inputs), past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(rows)
    return cache


def _putting(chosen: Sequence[int], values: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """Writes sources' streams [chosen, answer, d] into their rows, at the last positions."""

    def put(hidden: Tensor) -> Tensor:
        # Some decoders flatten rows and positions inside a layer.
        changed = hidden.reshape(rows, -1, hidden.shape[-1]).clone()
        changed[list(chosen), -values.shape[1] :] = values.to(hidden)
        return changed.reshape(hidden.shape)

    return put
