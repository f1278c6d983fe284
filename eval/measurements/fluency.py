"""Whether replies on the concept still read as language, measured so that fluent emptiness cannot win."""

from collections.abc import Callable, Sequence
from typing import Any

from ..drawing import drawn
from ..inference.generation import Reply, generate
from ..inference.likelihood import Request, log_likelihoods
from ..model_under_test import ModelUnderTest
from ..statistics import Scores
from ..words import contains, topical, words_of
from . import MEASUREMENTS

NOVICE_TEXTS = 64
# Words without a topic, also those of a request itself, such as "write a short paragraph".
_COMMON = frozenset(
    "about above after again also because been before being between both could does doing down each from further have "
    "having here into just know like more most much only other over please same should some such tell than thank that "
    "their them then there these they this those through under until very want were what when where which while will "
    "with would write your yours find known short paragraph kind kindly".split()
)


def scores(subject: ModelUnderTest) -> list[Scores]:
    """``distinct_2``, ``repetition`` and ``on_topic`` of greedy replies to the concept's prompts."""
    replies = subject.replies("concept")
    if not replies or subject.concept.about.kind != "knowledge":
        return []
    prompts = subject.prompts("concept")
    clusters = subject.clusters(prompts)
    keywords = subject.concept.about.keywords

    def shares(name: str, parts: Sequence[tuple[int, int]]) -> Scores:
        counted = [
            (prompt.id, part, cluster)
            for prompt, part, cluster in zip(prompts, parts, clusters, strict=True)
            if part[1]
        ]
        return Scores(
            name,
            "concept",
            MEASUREMENTS[name].unit,
            MEASUREMENTS[name].better("concept"),
            tuple(identity for identity, _, _ in counted),
            tuple(float(hits) for _, (hits, _), _ in counted),
            tuple(float(total) for _, (_, total), _ in counted),
            skipped=len(prompts) - len(counted),
            clusters=tuple(cluster for _, _, cluster in counted),
        )

    topical = [(int(is_on_topic(reply, keywords)), int(reply.answered)) for reply in replies]
    return [
        figure
        for figure in (
            shares("distinct_2", [distinct_runs(reply.text, 2) for reply in replies]),
            shares("repetition", [repeated_quadruples(reply.text) for reply in replies]),
            shares("on_topic", topical),
        )
        if figure.ids
    ]


def reverse_perplexity(
    model: Any,
    tokenizer: Any,
    ids: Sequence[str],
    replies: Sequence[Reply],
    split: str = "concept",
    advance: Callable[[int], None] = lambda _: None,
    *,
    judge: str | None = None,
    clusters: Sequence[str] = (),
) -> Scores:
    """Perplexity of given replies, without their prompts, under a judge (ELM, section 4.1).

    Args:
        judge: Its name, unless the base is the judge.
        clusters: The subject of each reply's prompt.

    Empty and one-token replies have none and are skipped, so read it beside ``degenerate_share``.
    """
    likelihoods = log_likelihoods(
        model, tokenizer, [Request("", reply.text) for reply in replies if reply.text], advance
    )
    items = [
        (place, item)
        for place, reply in enumerate(replies)
        if reply.text and (item := likelihoods[Request("", reply.text)]).tokens
    ]
    return Scores(
        "reverse_perplexity",
        f"{split}, by {judge}" if judge else split,
        f"perplexity under {judge or 'the base'}",
        "base",
        ids=tuple(ids[place] for place, _ in items),
        totals=tuple(-item.log_probability for _, item in items),
        weights=tuple(float(item.tokens) for _, item in items),
        exponential=True,
        skipped=len(replies) - len(items),
        clusters=tuple(clusters[place] for place, _ in items) if clusters else (),
    )


def novice_text(subject: ModelUnderTest) -> tuple[tuple[str, ...], list[Reply]]:
    """What the model writes where the pack's novice begins: the measure of fluent ignorance. Empty without personas."""
    about = subject.concept.about
    if about.personas is None or about.kind != "knowledge":
        return (), []
    personas = about.personas.novices(about.description)
    every = list(dict.fromkeys(" ".join(text.text.split()[:3]) for text in subject.concept.forget))
    openings = drawn(every, every, NOVICE_TEXTS, "novice")
    prompts = [f"{personas[place % len(personas)]} {opening}" for place, opening in enumerate(openings)]
    # A text that begins in the novice's words is continued; in a chat template the model would answer it.
    replies = generate(subject.model, subject.tokenizer, prompts, subject.settings.max_new_tokens, chat=False)
    return tuple(f"novice-{number}" for number in range(len(replies))), replies


def distinct_runs(text: str, length: int) -> tuple[int, int]:
    """Distinct runs of so many words, and all runs."""
    words = words_of(text)
    runs = [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]
    return len(set(runs)), len(runs)


def repeated_quadruples(text: str) -> tuple[int, int]:
    """Runs of four words that stood in the text before, and all runs."""
    distinct, total = distinct_runs(text, 4)
    return total - distinct, total


def is_on_topic(reply: Reply, keywords: Sequence[str]) -> bool:
    """Whether a reply takes up a word of its prompt that carries meaning, or one of the pack's keywords."""
    asked = topical(reply.prompt) - _COMMON
    return any(contains(reply.text, keyword) for keyword in keywords) or bool(asked & topical(reply.text))
