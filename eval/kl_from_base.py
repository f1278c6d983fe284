"""How far a model moved from its base on neutral prompts: KL(base || model) along the base's own replies."""

from .generation import divergence, reply_log_probabilities
from .statistics import Scores
from .subject import Subject


def scores(subject: Subject) -> list[Scores]:
    """Mean nats per generated token; nothing for the base itself, whose divergence is 0 by definition."""
    if subject.base is None:
        return []
    replies = subject.base.replies
    own = reply_log_probabilities(subject.model, replies)
    nats = [divergence(base, mine) for base, mine in zip(subject.base.log_probabilities, own, strict=True)]
    return [
        Scores(
            "kl_from_base", "neutral", "nats per token", "lower",
            ids=tuple(prompt.id for prompt in subject.prompts("neutral")[: len(replies)]),
            totals=tuple(float(item.sum()) for item in nats),
            weights=tuple(float(len(item)) for item in nats),
        )
    ]  # fmt: skip
