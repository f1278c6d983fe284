"""Gradient difference (Liu et al. 2022, arXiv 2203.12817; Maini et al. 2024, arXiv 2401.06121)."""

from torch import Tensor

from .recipe import UnlearningSettings, describe, learn, memory, prepare, run
from .story import story

__all__ = ["GradDiffSettings", "describe", "learn", "memory", "prepare", "run", "story"]


class GradDiffSettings(UnlearningSettings):
    """Gradient difference (Liu et al. 2022; Maini et al. 2024): ``log p(y_forget) - log p(y_retain)``."""

    recipe = "grad_diff"

    def forget_loss(self, nll: Tensor, lengths: Tensor, base_log_likelihoods: Tensor) -> Tensor:
        """``log p(y) / |y|``, mean over sequences."""
        return -(nll / lengths).mean()
