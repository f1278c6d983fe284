"""Log-likelihoods of texts, with forwards shared where possible.

Requests whose inputs are prefixes of one another (most often the choices of one question) run as one row. Rows are
sorted by length and right-padded; logits are computed only at positions that are scored.

Example:
    >>> request = Request("The capital of France is", " Paris")
    >>> likelihood = log_likelihoods(model, tokenizer, [request])[request]
    >>> likelihood.per_token  # nats
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...editing.modules import language_config, unembedding
from ...editing.training.packing import is_packing, on_device, packed, read_packed
from ..completed import asked
from .batches import read_in_batches
from .chat import render
from .encoding import encode

RANKED = 256
"""Distributions that are compared with their own token at a time, for its rank."""
VOCABULARY_BUDGET = 256 << 20
"""Bytes of logits, in fp32, that one batch may hold."""


@dataclass(frozen=True)
class Request:
    """Score ``continuation`` after ``prompt``; with an empty prompt, a whole text from its second token on."""

    prompt: str
    continuation: str
    reply: bool = False
    """The prompt is what a user asks and the continuation a whole reply: the prompt stands in the chat template, or as
    ``Question: ...\\nAnswer:`` where there is none, and the end token is scored too."""


@dataclass(frozen=True)
class Likelihood:
    """The score of a continuation: summed log-probability in nats, and a comparison with greedy decoding."""

    log_probability: float
    tokens: int
    greedy: tuple[bool, ...]
    """For each token, whether it is the model's most likely one."""
    rank: int
    """Rank of the first token in the vocabulary; 1 is the most likely token."""

    @property
    def per_token(self) -> float:
        """Mean log-probability per token, in nats."""
        return self.log_probability / self.tokens

    @property
    def recited(self) -> int:
        """Number of consecutive tokens at the end that greedy decoding reproduces."""
        return next((place for place, hit in enumerate(reversed(self.greedy)) if not hit), self.tokens)


@dataclass(frozen=True)
class Scored:
    """Token ids, of which those from ``start`` on are scored."""

    ids: tuple[int, ...]
    start: int


def encode_request(tokenizer: Any, request: Request) -> Scored:
    """Tokenize prompt and continuation together.

    The continuation starts at the first joint token that differs from the prompt's tokens, so a token across the
    boundary counts as continuation. The very first token is never scored, because nothing precedes it.
    """
    front, continuation, special = request.prompt, request.continuation, True
    if request.reply:
        # Chat templates write the begin token themselves; the tokenizer must not add a second one.
        special = not tokenizer.chat_template
        front = asked(front) if special else render(tokenizer, front)
        continuation = f" {continuation}" if special else continuation
    whole = tuple(encode(tokenizer, front + continuation, special=special))
    prompt = tuple(encode(tokenizer, front, special=special)) if front else ()
    shared = 0
    while shared < min(len(prompt), len(whole) - 1) and prompt[shared] == whole[shared]:
        shared += 1
    end = tokenizer.eos_token_id if request.reply else None
    return Scored(whole if end is None or whole[-1] == end else (*whole, end), max(1, shared))


def context_of(model: Any) -> int:
    """Most tokens that a model reads at once; without a limit, more than any text has."""
    return int(getattr(language_config(model), "max_position_embeddings", 0) or 1 << 30)


def windows(scored: Scored, context: int) -> list[Scored]:
    """Cut what is longer than the model's context into windows; each scored token is in exactly one window.

    A window's last tokens are scored, so that each has as much context as fits: all of it for a continuation that is
    short, at least half of it in a text of many windows.
    """
    parts, start, end = [], scored.start, 0
    while end < len(scored.ids) and start < len(scored.ids):
        # The last token of a window is scored and never read, hence one more than the context holds.
        end = min(len(scored.ids), max(context + 1, start + max(1, context // 2)))
        begin = max(0, end - context - 1)
        parts.append(Scored(scored.ids[begin:end], start - begin))
        start = end
    return parts


@torch.no_grad()
def log_likelihoods(
    model: Any, tokenizer: Any, requests: Sequence[Request], advance: Callable[[int], None] = lambda _: None
) -> dict[Request, Likelihood]:
    """Score every request once.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        requests: What to score; duplicates are scored once.
        advance: Called with the number of requests scored in each batch, for progress.

    Returns:
        Likelihoods by request. What is longer than the model's context is cut by ``windows``, and its parts summed. Of
        a text of one token nothing is scored: its ``tokens`` is 0.
    """
    distinct = list(dict.fromkeys(requests))
    scores = score_parts(model, [encode_request(tokenizer, request) for request in distinct], advance)
    return dict(zip(distinct, scores, strict=True))


@torch.no_grad()
def score_parts(
    model: Any, parts: Sequence[Scored], advance: Callable[[int], None] = lambda _: None
) -> list[Likelihood]:
    """The same for texts that are token ids already."""
    context = context_of(model)
    pieces = [(index, piece) for index, part in enumerate(parts) for piece in windows(part, context)]
    likelihoods: dict[int, Likelihood] = {}
    shared = share_rows([piece for _, piece in pieces])
    rows = list(shared)

    def read(batch: list[int]) -> dict[int, Likelihood]:
        members = [(place, index) for place, row in enumerate(batch) for index in shared[rows[row]]]
        scores = score_rows(model, [rows[row] for row in batch], [(p, pieces[index][1]) for p, index in members])
        return {index: score for (_, index), score in zip(members, scores, strict=True)}

    for _, of_batch in read_in_batches([len(row) for row in rows], batch_budget(model), read):
        likelihoods |= of_batch
        advance(len(of_batch))
    whole: list[list[Likelihood]] = [[] for _ in parts]
    for place, (index, _) in enumerate(pieces):
        whole[index].append(likelihoods[place])
    return [_joined(scored) for scored in whole]


def _joined(pieces: Sequence[Likelihood]) -> Likelihood:
    if not pieces:
        return Likelihood(0.0, 0, (), 1)
    greedy = tuple(hit for piece in pieces for hit in piece.greedy)
    return Likelihood(sum(piece.log_probability for piece in pieces), len(greedy), greedy, pieces[0].rank)


def share_rows(parts: Sequence[Scored]) -> dict[tuple[int, ...], list[int]]:
    """Map each input that must run to the indices of its parts; an input that is a prefix of another shares its row."""
    by_input: dict[tuple[int, ...], list[int]] = {}
    for index, part in enumerate(parts):
        by_input.setdefault(part.ids[:-1], []).append(index)
    rows: dict[tuple[int, ...], list[int]] = {}
    longest: tuple[int, ...] = ()
    # In reverse order, an input comes directly after those that it is a prefix of.
    for ids in sorted(by_input, reverse=True):
        if longest[: len(ids)] != ids:
            longest = ids
        rows.setdefault(longest, []).extend(by_input[ids])
    return rows


def batch_budget(model: Any) -> int:
    """Tokens per batch: limited by the size of the logits, and on a CPU by the size of its caches."""
    return tokens_of_batch(int(language_config(model).vocab_size), model.device)


def tokens_of_batch(vocabulary: int, device: torch.device) -> int:
    """The same of a model that is not loaded."""
    by_logits = VOCABULARY_BUDGET // (4 * vocabulary)
    return max(64, min(by_logits, 16384 if device.type == "cuda" else 2048))


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` [rows, longest] of right-padded rows."""
    return _padded(rows, device, left=False)


def pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """The same of left-padded rows, which all end at the last position."""
    return _padded(rows, device, left=True)


def _padded(rows: Sequence[Sequence[int]], device: torch.device, *, left: bool) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    # Padding is token 0, which every vocabulary has. A tokenizer's padding token may lie outside the model's embedding.
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        columns = slice(longest - len(row), None) if left else slice(len(row))
        ids[place, columns] = torch.tensor(row, dtype=torch.long)
        mask[place, columns] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def padded_logits(model: Any, rows: Sequence[Sequence[int]], first: int) -> Float[Tensor, "batch positions vocab"]:
    """Logits of right-padded rows from position ``first`` on."""
    inputs = pad_right(rows, model.device)
    # Indices on the processor suit any device, and the last layer may lie on another GPU than the inputs.
    keep = torch.arange(first, inputs["input_ids"].shape[1])
    logits: Tensor = model(**inputs, use_cache=False, logits_to_keep=keep).logits
    return logits


def score_rows(model: Any, rows: Sequence[Sequence[int]], members: Sequence[tuple[int, Scored]]) -> list[Likelihood]:
    """Run rows once and score every member: the index of its row, and the part of the row to score."""
    places = [place for place, part in members for _ in part.ids[part.start :]]
    # The logits at a position are about the next token.
    positions = [p - 1 for _, part in members for p in range(part.start, len(part.ids))]
    read = _packed_logits if is_packing(model) else _padded_logits
    logits, inverse = read(model, rows, torch.tensor(places), torch.tensor(positions))
    targets = torch.tensor([token for _, part in members for token in part.ids[part.start :]], device=logits.device)
    inverse, log_probabilities = inverse.to(logits.device), logits.float().log_softmax(-1)
    chosen = log_probabilities[inverse, targets]
    greedy = log_probabilities.argmax(-1)[inverse] == targets
    lengths = [len(part.ids) - part.start for _, part in members]
    starts = torch.tensor([0, *lengths[:-1]], device=logits.device).cumsum(0)
    # In chunks, because the comparison copies whole distributions.
    ranks = 1 + torch.cat(
        [(log_probabilities[inverse[chunk]] > chosen[chunk, None]).sum(-1) for chunk in starts.split(RANKED)]
    )
    sums = [float(piece.sum()) for piece in chosen.cpu().double().split(lengths)]
    hits = [tuple(piece.tolist()) for piece in greedy.cpu().split(lengths)]
    return [Likelihood(total, len(hit), hit, rank) for total, hit, rank in zip(sums, hits, ranks.tolist(), strict=True)]


def _padded_logits(
    model: Any, rows: Sequence[Sequence[int]], places: Tensor, positions: Tensor
) -> tuple[Float[Tensor, "cells vocab"], Tensor]:
    """Logits at some positions of some rows, by their place among the rows, and which of them is each one's.

    Choices of one question share positions; normalizing each distribution once saves most of the work.
    """
    first = int(positions.min())
    logits = padded_logits(model, rows, first)
    cells, inverse = torch.unique(torch.stack([places, positions - first]), dim=1, return_inverse=True)
    return logits[cells[0].to(logits.device), cells[1].to(logits.device)], inverse


def _packed_logits(
    model: Any, rows: Sequence[Sequence[int]], places: Tensor, positions: Tensor
) -> tuple[Float[Tensor, "cells vocab"], Tensor]:
    """The same of rows that are read as one, what they begin with once."""
    inputs = packed(rows, trained=False)
    starts = torch.tensor([0, *accumulate(map(len, rows[:-1]))])
    cells, inverse = torch.unique(inputs["where"][starts[places] + positions], return_inverse=True)
    states = read_packed(model, on_device(inputs, model.device))
    return unembedding(model)(states[cells.to(states.device)]), inverse
