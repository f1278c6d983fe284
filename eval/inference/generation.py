"""Replies of a model, batched by length, and its next-token distributions along replies."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig

from ...editing.errors import ExciseError, RequestError
from ...editing.modules import causal_model, unembedding
from ...editing.numerics.wide import wide
from ...editing.training.packing import is_packing, on_device, packed, read_packed
from .batches import read_in_batches
from .chat import encode_prompt, thoughts_and_answer
from .likelihood import batch_budget, context_of, pad_left, padded_logits
from .lockstep import Lockstep, draw, goes_on_in_step, tokens_of_replies

LOOK = 8
"""Tokens after which an accelerator is asked which replies have ended, for which it is waited."""


@dataclass(frozen=True)
class Reply:
    """A reply to one prompt."""

    prompt: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    """Generated tokens, with the end token if the reply reached it."""
    text: str
    """Its answer; empty if it was still thinking when it was cut."""
    thoughts: str | None = None
    """What the model thought before it answered; None if it did not think."""
    answered: bool = True
    """False if the thoughts never end."""

    @property
    def shown(self) -> str:
        """The answer as people read it, or the thoughts with a word on the missing answer."""
        return self.text if self.answered else f"(no answer, still thinking:) {self.thoughts}"


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    tokens: int,
    advance: Callable[[int], None] = lambda _: None,
    *,
    chat: bool = True,
    sample_seed: int | None = None,
    as_shipped: bool = False,
    beginning: str = "",
) -> list[Reply]:
    """Continue each prompt by at most ``tokens`` tokens; replies are in the order of the prompts.

    Greedy replies are the argmax of the model's logits at every token, and samples are draws from their softmax,
    whatever the model's generation_config says.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: What the user says, or plain texts if ``chat`` is false.
        tokens: Largest number of new tokens; prompt and reply together keep within the model's context, for which a
            prompt loses its first tokens.
        advance: Called with the number of prompts of each finished batch, for progress.
        chat: Put prompts into the chat template, if the tokenizer has one.
        sample_seed: None decodes greedily; a number samples from the model's distribution with this seed.
        as_shipped: Decode as the model's generation_config says instead, draws with a fixed seed.
        beginning: Text that every reply goes on from.

    Raises:
        RequestError: A prompt holds no token.
        ExciseError: A reply is to be drawn from probabilities that are NaN.

    Example:
        >>> generate(model, tokenizer, ["Why is the sky blue?"], 40)[0].text
    """
    context = context_of(model)
    tokens = min(tokens, context - 1)
    encoded = [
        encode_prompt(tokenizer, prompt, chat=chat, beginning=beginning)[-(context - tokens) :] for prompt in prompts
    ]
    if not all(encoded):
        raise RequestError(
            f"prompt {encoded.index([]) + 1} of {len(prompts)} holds no token and the tokenizer adds none, so there is"
            " nothing to continue; write at least a word"
        )
    ends = end_tokens(model, tokenizer)
    replies: list[Reply | None] = [None] * len(prompts)
    chances = None
    if sample_seed is not None:
        # Drawn for all prompts before any is read, so that draws do not depend on which share a batch.
        chances = torch.rand(len(prompts), tokens, generator=torch.Generator().manual_seed(sample_seed))

    def decode(batch: list[int]) -> list[list[int]]:
        rows = [encoded[index] for index in batch]
        if as_shipped:
            return _as_shipped(causal_model(model), tokenizer, rows, tokens, ends)
        if not goes_on_in_step(model):
            return _by_library(causal_model(model), sample_seed, rows, tokens, ends)
        return _in_step(model, rows, tokens, ends, None if chances is None else chances[batch])

    # Replies are counted at the length that they may reach.
    lengths = [len(ids) + tokens for ids in encoded]
    for batch, continued in read_in_batches(lengths, tokens_of_replies(model, model.device), decode):
        for index, ids in zip(batch, continued, strict=True):
            replies[index] = _reply(tokenizer, prompts[index], encoded[index], ids)
        advance(len(batch))
    return [reply for reply in replies if reply is not None]


def _reply(tokenizer: Any, prompt: str, prompt_ids: Sequence[int], ids: Sequence[int]) -> Reply:
    thoughts, answer = thoughts_and_answer(tokenizer, prompt_ids, ids)
    return Reply(prompt, tuple(prompt_ids), tuple(ids), answer or "", thoughts, answer is not None)


def _in_step(
    model: Any, rows: Sequence[list[int]], tokens: int, ends: set[int], chances: Float[Tensor, "rows tokens"] | None
) -> list[list[int]]:
    """Continue rows by what is likeliest, or by draws from the whole distribution."""
    lockstep, head = Lockstep(model, rows, tokens), unembedding(model)
    device = lockstep.ids.device
    last = torch.tensor(sorted(ends), dtype=torch.long, device=device)
    said = torch.zeros(len(rows), tokens, dtype=torch.long, device=device)
    going, ended = torch.arange(len(rows), device=device), torch.zeros(len(rows), dtype=torch.bool, device=device)
    # A processor has no answer to wait for.
    look = 1 if device.type == "cpu" else LOOK
    states, broken = torch.stack([of_row[-1] for of_row in lockstep.read()]), torch.zeros((), device=device)
    for turn in range(tokens):
        logits = head(states)
        if chances is None:
            chosen = logits.argmax(-1)
        else:
            log_p = wide(logits).log_softmax(-1)
            # One logit that is NaN or infinite makes all of its row NaN, from which any token would be drawn.
            broken += log_p[:, 0].isnan().any()
            chosen = draw(log_p, chances.to(device)[going, turn])
        said[going, turn] = chosen
        ended |= torch.isin(chosen, last)
        if turn % look == 0:
            left = (~ended).nonzero()[:, 0]
            if not len(left):
                break
            # To take rows out copies what the others have left behind.
            if 2 * len(left) <= len(going):
                lockstep.keep(left)
                going, ended, chosen = going[left], ended[left], chosen[left]
        if turn < tokens - 1:
            states = lockstep.feed(chosen)
    if broken:
        raise ExciseError(
            "no reply can be drawn: the model's probabilities of the next token are NaN; its weights or activations"
            " hold NaN or infinity, so use another checkpoint, or --dtype float32"
        )
    return [_until_end(ids, ends) for ids in said.tolist()]


def _by_library(
    model: Any, seed: int | None, rows: Sequence[list[int]], tokens: int, ends: set[int]
) -> list[list[int]]:
    with plain_decoding(model, ends):
        return _continue(model, rows, ends, seed, max_new_tokens=tokens, do_sample=seed is not None)


def _as_shipped(model: Any, tokenizer: Any, rows: Sequence[list[int]], tokens: int, ends: set[int]) -> list[list[int]]:
    """Continue as the generation_config says: penalties, beams, draws, strings that end a reply, and the rest."""
    # What shapes the result, and not the replies.
    result = {"pad_token_id": 0, "num_return_sequences": 1, "return_dict_in_generate": False}
    ended = {"tokenizer": tokenizer, "eos_token_id": sorted(ends) or None}
    return _continue(model, rows, ends, 0, max_new_tokens=tokens, **ended, **result)


def _continue(model: Any, rows: Sequence[list[int]], ends: set[int], seed: int | None, **how: Any) -> list[list[int]]:
    # Padded on the left, because new tokens must come directly after the prompt's last one.
    padded = pad_left(rows, model.device)
    # transformers samples from torch's global generator, so it is seeded in a fork that puts the old state back.
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        output = model.generate(**padded, **how)
    continued = output[:, padded["input_ids"].shape[1] :].tolist()
    # transformers fills rows that ended early up to the longest one; that padding is no part of the reply.
    return [_until_end(ids, ends) for ids in continued]


NEVER_SET_ASIDE = {
    "transformers_version", "_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache",
    "cache_implementation", "return_dict_in_generate", "output_scores", "output_logits", "output_attentions",
    "output_hidden_states", "num_return_sequences", "max_length", "max_new_tokens",
}  # fmt: skip
"""Keys of a generation_config that change no token of a reply, or that every measurement sets itself."""


def set_aside(model: Any) -> dict[str, Any]:
    """What the model's generation_config asks for beyond plain decoding; replies are measured without it."""
    asked = causal_model(model).generation_config.to_diff_dict()
    return {key: value for key, value in sorted(asked.items()) if key not in NEVER_SET_ASIDE and value is not None}


@contextmanager
def plain_decoding(model: Any, ends: set[int]) -> Iterator[None]:
    """Let a model generate from its own distribution: set aside all that its generation_config would add to it.

    Instruct models ship repetition penalties, beams, suppressed tokens and more. ``generate`` takes whatever a call
    leaves out from the shipped configuration, so the configuration itself is exchanged, and put back afterwards.
    """
    shipped = model.generation_config
    # Whole distributions are sampled: without top_k=0, transformers would cut them at 50. The filler is token 0, which
    # every vocabulary has.
    model.generation_config = GenerationConfig(
        eos_token_id=sorted(ends) or None, bos_token_id=shipped.bos_token_id, pad_token_id=0, top_k=0
    )
    try:
        yield
    finally:
        model.generation_config = shipped


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Token ids that end a reply, from the generation config and the tokenizer."""
    named = causal_model(model).generation_config.eos_token_id
    ends = set(named) if isinstance(named, list) else {named}
    return {token for token in (*ends, tokenizer.eos_token_id) if token is not None}


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    for place, token in enumerate(ids):
        if token in ends:
            return ids[: place + 1]
    return ids


def reply_log_probabilities(model: Any, replies: Sequence[Reply]) -> list[Float[Tensor, "tokens vocab"]]:
    """The model's log-probabilities of all tokens (nats) at each position of the replies, fp32 on the CPU."""
    by_index = dict(batched_log_probabilities(model, replies))
    return [by_index[index] for index in range(len(replies))]


@torch.no_grad()
def batched_log_probabilities(
    model: Any, replies: Sequence[Reply]
) -> Iterator[tuple[int, Float[Tensor, "tokens vocab"]]]:
    """The same, reply by reply with its place, in the order in which batches are read."""
    rows = [reply.prompt_ids + reply.ids for reply in replies]
    # The logits at a position are about the next token, so a reply's logits start one position before it.
    firsts = [len(reply.prompt_ids) - 1 for reply in replies]

    def padded(batch: list[int]) -> list[Tensor]:
        first = min(firsts[index] for index in batch)
        logits = padded_logits(model, [rows[index] for index in batch], first)
        return [logits[n, firsts[i] - first :][: len(replies[i].ids)] for n, i in enumerate(batch)]

    def as_one(batch: list[int]) -> list[Tensor]:
        inputs, lengths = packed([rows[i] for i in batch], trained=False), [len(replies[i].ids) for i in batch]
        states, pieces = read_packed(model, on_device(inputs, model.device)), inputs["where"]
        read = zip(pieces.split([len(rows[i]) for i in batch]), batch, lengths, strict=True)
        where = torch.cat([piece[firsts[i] :][:length] for piece, i, length in read])
        return [*unembedding(model)(states[where.to(states.device)]).split(lengths)]

    read = as_one if is_packing(model) else padded
    for batch, logits in read_in_batches([len(row) for row in rows], batch_budget(model), read):
        for index, of_reply in zip(batch, logits, strict=True):
            yield index, of_reply.float().log_softmax(-1).cpu()


def divergence(base: Float[Tensor, "tokens vocab"], other: Float[Tensor, "tokens vocab"]) -> Float[Tensor, " tokens"]:
    """KL(base || other) at each token, in nats."""
    # Rounding can leave a value slightly below 0.
    return (base.exp() * (base - other)).sum(-1).clamp_min(0)
