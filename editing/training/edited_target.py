"""ELM's target: the frozen model's distribution, moved away from what an expert predicts and toward a novice.

Example:
    >>> edit = TargetEdit(strength=1.5)
    >>> log_p = edit.log_p(bare, expert, novice)  # log-probabilities [n, vocab] of a frozen model
    >>> targets = keep_top(log_p, 128)

Source: ELM (Gandikota et al. 2024), equations 5 and 6; ramp, temperature and top-k are those of the authors' code.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..numerics.wide import widest
from .soft_targets import cut_to, mixed


@dataclass(frozen=True)
class TargetEdit:
    """``p0 (p_novice / p_expert)^strength``, normalized over the whole vocabulary."""

    strength: float
    """The paper's eta."""
    one_sided: bool = False
    """Above strength 1, only lower the tokens that the expert prefers."""
    ramp: bool = False
    """Let the strength grow from 1 to its full value along the positions of a context."""
    temperature: float = 1.0
    """What the logits of all three predictions are divided by, before they get here."""
    top_k: int = 0
    """Tokens of each position that keep their probability; 0 keeps all."""

    def strengths(self, count: int, device: torch.device) -> Float[Tensor, " count"]:
        """The strength at each of a context's positions."""
        first = 1.0 if self.ramp else self.strength
        return torch.linspace(first, self.strength, count, device=device, dtype=widest(device))

    def log_p(
        self,
        bare: Float[Tensor, "n v"],
        expert: Float[Tensor, "n v"],
        novice: Float[Tensor, "n v"],
        strengths: Float[Tensor, " n"] | None = None,
    ) -> Float[Tensor, "n v"]:
        """Log-probabilities of the edited distribution; without ``strengths`` each position has the full one."""
        strength = self.strength if strengths is None else strengths.to(bare)
        log_p = mixed(bare, expert, novice, strength, one_sided=self.one_sided)
        return cut_to(log_p, self.top_k) if self.top_k else log_p
