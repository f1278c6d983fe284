"""Retain texts that repeat forget texts: what both erases and keeps a sentence does neither."""

from collections import defaultdict
from dataclasses import replace

from ...editing.errors import RequestError
from ...eval.concept import Concept
from ...eval.words import words_of

NEAR = 0.8
"""Jaccard similarity of word triples from which two texts count as the same."""


def without_overlap(concept: Concept) -> tuple[Concept, tuple[str, ...]]:
    """The concept without retain texts that are forget texts, exactly or nearly, and a warning that says how many were
    left out.

    Raises:
        RequestError: Nothing is left to retain.
    """
    exact = {_words(text.text) for text in concept.forget}
    shingled = [_shingles(words) for words in exact]
    # By triple, the texts that hold it: only texts that share one are compared.
    holders = defaultdict(list)
    for place, shingles in enumerate(shingled):
        for shingle in shingles:
            holders[shingle].append(place)
    same, near, distinct = 0, 0, []
    for text in concept.retain:
        words = _words(text.text)
        if words in exact:
            same += 1
        elif _nearest(_shingles(words), shingled, holders) >= NEAR:
            near += 1
        else:
            distinct.append(text)
    if concept.retain and not distinct:
        raise RequestError(
            f"every retain text of concept {concept.ref} repeats a forget text; give texts on other things in"
            " retain.jsonl"
        )
    if not same + near:
        return concept, ()
    warning = (
        f"Left out of training: {same + near} of {len(concept.retain)} retain texts, for repeating forget texts ({same}"
        f" exactly, {near} nearly)."
    )
    return replace(concept, retain=tuple(distinct)), (warning,)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in words_of(text) if word[0].isalnum() or word[0] == "_")


def _shingles(words: tuple[str, ...]) -> frozenset[int]:
    # Hashes, because a corpus has millions of triples.
    return frozenset(hash(words[start : start + 3]) for start in range(max(1, len(words) - 2)))


def _nearest(
    shingles: frozenset[int],
    others: list[frozenset[int]],
    holders: dict[int, list[int]],
) -> float:
    """Largest Jaccard similarity with any of the others."""
    shared: dict[int, int] = defaultdict(int)
    for shingle in shingles:
        for place in holders.get(shingle, ()):
            shared[place] += 1
    return max((n / (len(shingles) + len(others[place]) - n) for place, n in shared.items()), default=0.0)
