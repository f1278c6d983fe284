"""The anatomy of an edit: how many directions of each matrix it moved, where they end, and in which parts of the model.

A change that is one low-rank adapter ends in a cliff: its singular values fall by a large factor at one rank. Such an
edit is called shallow: it moves few directions, and published defences that did so were undone by little fine-tuning.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

Part = Literal["attention", "mlp", "embedding", "other"]
CLIFF = 3.0
"""Factor by which singular values must fall at one rank: those of rounding alone fall by less than 1.2."""
SHALLOW_SHARE = 0.25
"""A cliff above this share of a matrix's ranks is no sign of a low-rank change."""
_RESOLVED = 1e-6
"""Singular values below this share of the largest are errors of the computation."""
_PARTS: tuple[tuple[Part, str], ...] = (
    ("embedding", r"embed|\bwte\b|\bwpe\b|lm_head|embed_out"),
    ("attention", r"attn|attention|mixer|mamba|conv"),
    ("mlp", r"mlp|ffn|feed_forward|expert|moe|\bfc[12]\b|router"),
)


@dataclass(frozen=True)
class Spectrum:
    """What the singular values of one matrix's change say."""

    effective_rank: float
    """exp of the entropy of the normalized singular values (Roy and Vetterli 2007)."""
    stable_rank: float
    """Squared Frobenius norm over the squared largest singular value (Rudelson and Vershynin 2007)."""
    rank_99: int
    """Fewest singular directions that hold 99% of the squared norm."""
    cliff: float | None
    """Largest factor by which one singular value exceeds the next; None for a matrix of one row or column."""
    cliff_rank: int | None
    """How many singular values stand before that fall."""
    shallow: bool
    """Whether the change ends in a cliff at a low rank."""


def spectrum_of(values: Float[Tensor, " k"]) -> Spectrum:
    """Describe a change by its singular values, largest first.

    Args:
        values: All singular values of the change; at least one is not 0.

    Example:
        >>> import torch
        >>> found = spectrum_of(torch.tensor([3.0, 1.0, 0.01, 0.009, 0.008, 0.007, 0.006, 0.005]))
        >>> found.cliff_rank, found.shallow, found.rank_99
        (2, True, 2)
    """
    squares = values.double().square()
    shares = squares.cumsum(0) / squares.sum()
    rank_99 = int((shares < 0.99).sum()) + 1
    cliff, rank = _cliff(values.double())
    return Spectrum(
        effective_rank(values),
        float(squares.sum() / squares[0]),
        rank_99,
        cliff,
        rank,
        cliff is not None and rank is not None and cliff >= CLIFF and rank <= SHALLOW_SHARE * len(values),
    )


def _cliff(values: Tensor) -> tuple[float | None, int | None]:
    if len(values) < 2:
        return None, None
    held = values.clamp_min(_RESOLVED * float(values[0]))
    falls = held[:-1] / held[1:]
    place = int(falls.argmax())
    return float(falls[place]), place + 1


def effective_rank(values: Float[Tensor, " k"]) -> float:
    """exp of the entropy of singular values, scaled to sum to 1 (Roy and Vetterli 2007); 1 for a rank-one matrix."""
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float((-(shares * shares.log()).sum()).exp())


def part_of(name: str) -> Part:
    """The part of a model that a tensor belongs to, by its name; norms are none of them."""
    if "norm" in name or re.search(r"\bln_", name):
        return "other"
    return next((part for part, pattern in _PARTS if re.search(pattern, name)), "other")


def layer_of(name: str) -> int | None:
    """The number of a tensor's layer, or None."""
    found = re.search(r"\.(\d+)\.", name)
    return None if found is None else int(found[1])


def shares_of(changes: Sequence[tuple[str, float]]) -> dict[Part, float]:
    """Of the squared norm of a whole change, the share that each part of the model holds, largest first.

    Args:
        changes: Name and Frobenius norm of each tensor's change.
    """
    sums: dict[Part, float] = {}
    for name, norm in changes:
        sums[part_of(name)] = sums.get(part_of(name), 0.0) + norm**2
    total = sum(sums.values())
    return {part: value / total for part, value in sorted(sums.items(), key=lambda item: -item[1])} if total else {}


@dataclass(frozen=True)
class Anatomy:
    """What the changes of all tensors say together."""

    shares: dict[Part, float]
    """Of the squared norm of the whole change, the share of each part of the model, largest first."""
    layers: int
    """Layers in which a tensor changed."""
    layers_untouched: tuple[int, ...]
    """Layers in which none did."""
    matrices: int
    """Changed matrices whose singular values are known."""
    shallow: int
    """Those whose change ends in a cliff at a low rank."""
    deepest_cliff: int | None
    """The highest rank of such a cliff."""

    def sentences(self) -> list[str]:
        """The same in words."""
        parts = ", ".join(f"{_WORDS[part]} {share:.0%}" for part, share in self.shares.items())
        said = [f"of the squared change: {parts}"] if parts else []
        if self.layers:
            named = f"; untouched: {', '.join(map(str, self.layers_untouched))}" if self.layers_untouched else ""
            said.append(f"layers that changed: {self.layers} of {self.layers + len(self.layers_untouched)}{named}")
        if self.matrices:
            said.append(self._depth())
        return said

    def _depth(self) -> str:
        if not self.shallow:
            return f"no cliff in the singular values of any of {self.matrices} matrices: not one low-rank adapter"
        return (
            f"shallow: in {self.shallow} of {self.matrices} matrices the change ends in a cliff at rank"
            f" {self.deepest_cliff} or below: few directions, which little fine-tuning can undo"
        )


_WORDS: dict[Part, str] = {"attention": "attention", "mlp": "MLP", "embedding": "embeddings", "other": "other"}


def anatomy(changes: Sequence[tuple[str, float, Spectrum | None]], names: Sequence[str]) -> Anatomy:
    """Put the changes of all tensors together.

    Args:
        changes: Name, Frobenius norm and spectrum of each tensor's change.
        names: All tensors that were compared.
    """
    touched = {layer for name, _, _ in changes if (layer := layer_of(name)) is not None}
    every = {layer for name in names if (layer := layer_of(name)) is not None}
    known = [found for _, _, found in changes if found is not None]
    shallow = [found for found in known if found.shallow]
    return Anatomy(
        shares_of([(name, norm) for name, norm, _ in changes]),
        len(touched),
        tuple(sorted(every - touched)),
        len(known),
        len(shallow),
        max((found.cliff_rank for found in shallow if found.cliff_rank is not None), default=None),
    )
