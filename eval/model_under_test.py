"""A model under measurement. What several measurements need is computed once and shared."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .concept import Concept, Prompt, RetainText
from .drawing import drawn
from .inference.chat import PromptFormat
from .inference.encoding import encode
from .inference.generation import Reply, generate
from .inference.kept import Kept, kept
from .inference.likelihood import Likelihood, Request, context_of, log_likelihoods
from .inference.prompts import PLAIN_PROMPTS
from .items import Item, clusters_of, held_out_texts

TEXT_TOKENS = 256
"""Tokens of a retain text along which the divergence from the base is measured, at most."""


@dataclass(frozen=True)
class EvalSettings:
    """How much is measured."""

    max_new_tokens: int = 24
    """Greedy tokens a reply."""
    kl_prompts: int = 64
    """Neutral prompts, and retain texts, along which the divergence from the base is measured; drawn like questions."""
    questions: int = 0
    """Questions and retain texts a split, at most, drawn at random over subjects; 0 takes all."""
    as_shipped: bool = False
    """Decode replies as the model's generation_config says; otherwise greedily."""
    prompts: PromptFormat = field(default_factory=PromptFormat)
    """How prompts are put into chat templates."""


def prompts_of(concept: Concept, split: str) -> list[Prompt]:
    """Open prompts of a split; if the pack has no neutral ones, everyday requests take their place."""
    prompts = [prompt for prompt in concept.prompts if prompt.split == split]
    return prompts or (list(PLAIN_PROMPTS) if split == "neutral" else [])


class ModelUnderTest:
    """A model, its tokenizer and a concept, with everything measured so far."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        concept: Concept,
        settings: EvalSettings,
        base: "Baseline | None" = None,
        advance: Callable[[int], None] = lambda _: None,
    ):
        """``base`` holds the base model's replies, for measurements that compare; None for the base itself."""
        self.model, self.tokenizer, self.concept, self.settings = model, tokenizer, concept, settings
        self.base, self.advance = base, advance
        self._likelihoods: dict[Request, Likelihood] = {}
        self._replies: dict[str, list[Reply]] = {}
        self._baseline: Baseline | None = None
        self.known: Mapping[str, Reply] = {}
        """Replies by the id of their prompt that need not be made, because somebody knows that they would be these."""

    def likelihoods(self, requests: Sequence[Request]) -> list[Likelihood]:
        """Log-likelihoods in the order of the requests; ``prepare`` shares forwards between measurements."""
        self.prepare(requests)
        return [self._likelihoods[request] for request in requests]

    def prepare(self, requests: Sequence[Request]) -> None:
        """Score all requests that were not scored yet."""
        new = [request for request in requests if request not in self._likelihoods]
        if new:
            self._likelihoods |= log_likelihoods(self.model, self.tokenizer, new, self.advance)

    def clusters(self, rows: Sequence[Item]) -> tuple[str, ...]:
        """The subject of each row of the pack."""
        return clusters_of(self.concept, rows)

    def prompts(self, split: str) -> list[Prompt]:
        """Open prompts of a split; if the pack has no neutral ones, everyday requests take their place."""
        return prompts_of(self.concept, split)

    def replies(self, split: str) -> list[Reply]:
        """Greedy replies to the prompts of a split, in their order."""
        if split not in self._replies:
            prompts, tokens = self.prompts(split), self.settings.max_new_tokens
            texts = [prompt.prompt for prompt in prompts if prompt.id not in self.known]
            made = iter(self._generated(texts, tokens) if texts else [])
            self._replies[split] = [self.known.get(prompt.id) or next(made) for prompt in prompts]
        return self._replies[split]

    def by_prompt(self, split: str) -> dict[str, Reply]:
        """The same replies by the id of their prompt."""
        return {one.id: reply for one, reply in zip(self.prompts(split), self.replies(split), strict=True)}

    def generated(self, split: str) -> list[Reply]:
        """The replies of a split that were made so far; none where nothing asked for them, or that were known."""
        replies = self._replies.get(split, [])
        prompts = self.prompts(split)[: len(replies)]
        return [reply for prompt, reply in zip(prompts, replies, strict=True) if prompt.id not in self.known]

    def completions(
        self, prompts: Sequence[str], tokens: int, *, chat: bool = False, beginning: str = ""
    ) -> list[Reply]:
        """Greedy continuations of plain texts, or replies in the chat template that go on from ``beginning``."""
        return self._generated(prompts, tokens, chat=chat, beginning=beginning)

    def _generated(self, texts: Sequence[str], tokens: int, *, chat: bool = True, beginning: str = "") -> list[Reply]:
        shipped = self.settings.as_shipped
        return generate(
            self.model,
            self.tokenizer,
            texts,
            tokens,
            self.advance,
            chat=chat,
            as_shipped=shipped,
            beginning=beginning,
        )

    def baseline(self) -> "Baseline":
        """This model's replies to neutral prompts and its distributions along them, for others to be compared with."""
        if self._baseline is None:
            most = self.settings.kl_prompts
            prompts = self.prompts("neutral")
            asked = list(zip(prompts, self.replies("neutral"), strict=True))
            chosen = drawn(asked, self.clusters(prompts), most, "divergence")
            replies = [reply for _, reply in chosen]
            readable = readable_texts(self.model, self.tokenizer, held_out_texts(self.concept))
            usable = drawn(readable, self.clusters([row for row, _ in readable]), most, "divergence")
            texts = [text for _, text in usable]
            self._baseline = Baseline(
                replies,
                kept(self.model, replies),
                texts,
                kept(self.model, texts),
                tuple(prompt for prompt, _ in chosen),
                tuple(row for row, _ in usable),
            )
        return self._baseline


def readable_texts(model: Any, tokenizer: Any, rows: Sequence[RetainText]) -> list[tuple[RetainText, Reply]]:
    """Texts along which a divergence can be measured: the first token serves as the prompt, and the rest as the reply."""
    # No text is read further than the model can read, nor further than its distributions are worth their memory.
    context = min(context_of(model), TEXT_TOKENS)
    encoded = [(row, encode(tokenizer, row.text)[:context]) for row in rows]
    return [(row, Reply("", tuple(ids[:1]), tuple(ids[1:]), row.text)) for row, ids in encoded if len(ids) > 1]


@dataclass(frozen=True)
class Baseline:
    """The base model's replies to neutral prompts, and its distributions along them and along retain texts."""

    replies: list[Reply]
    distributions: list[Kept] = field(repr=False)
    texts: list[Reply]
    text_distributions: list[Kept] = field(repr=False)
    prompts: tuple[Prompt, ...]
    rows: tuple[RetainText, ...]
    """Retain texts, one for each of ``texts``."""
