"""Negative preference optimization (Zhang et al. 2024, arXiv 2404.05868)."""

from pydantic import Field
from torch import Tensor
from torch.nn.functional import softplus

from .recipe import UnlearningSettings, describe, learn, memory, prepare, run
from .story import story

__all__ = ["NpoSettings", "describe", "learn", "memory", "prepare", "run", "story"]


class NpoSettings(UnlearningSettings):
    """NPO (Zhang et al. 2024, equation 3): ``2/beta log(1 + (p(y)/p_base(y))^beta)``, and the retain texts' NLL."""

    recipe = "npo"
    compares_with_base = True
    beta: float = Field(0.1, gt=0)
    """Inverse temperature. Higher values stop pushing an answer down sooner (paper: 0.1)."""

    def forget_loss(self, nll: Tensor, lengths: Tensor, base_log_likelihoods: Tensor) -> Tensor:
        """Equation 3."""
        # softplus is log(1 + exp(x)) without overflow.
        return (2 / self.beta) * softplus(self.beta * (-nll - base_log_likelihoods)).mean()
