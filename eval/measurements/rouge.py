"""ROUGE-L of a reply against the right one, by the library that the benchmarks use."""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ...editing.errors import RequestError
from .tofu import EXTRA


@dataclass(frozen=True)
class Rouge:
    """Overlap by the longest common subsequence of words."""

    recall: float
    """Share of the right reply's words, in order, that the reply has."""
    f1: float
    """Harmonic mean of recall and precision."""


def rouge_l(right: str, reply: str, *, stem: bool = True) -> Rouge:
    """ROUGE-L (Lin 2004).

    Args:
        right: What should have been said.
        reply: What was said.
        stem: Compare words by their stems (Porter), as TOFU does and MUSE does not.

    Raises:
        RequestError: rouge-score is not installed.

    Example:
        >>> rouge_l("the sky is blue", "blue is the sky").recall
        0.5
    """
    score = _scorer(stem).score(right, reply)["rougeL"]
    return Rouge(float(score.recall), float(score.fmeasure))


def is_countable(right: str) -> bool:
    """Whether ROUGE sees a word in a text: the benchmarks' library knows Latin letters and digits alone.

    Example:
        >>> is_countable("Paris"), is_countable("巴黎")
        (True, False)
    """
    return re.search("[a-z0-9]", right.lower()) is not None


def require_rouge(what: str) -> None:
    """Check that rouge-score is there, before a model is loaded.

    Raises:
        RequestError: It is not.
    """
    try:
        import rouge_score  # noqa: F401
    except ImportError as error:
        raise RequestError(f"{what} needs rouge-score, which is not installed; {EXTRA}") from error


@lru_cache(maxsize=2)
def _scorer(stem: bool) -> Any:
    require_rouge("ROUGE")
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=stem)
