"""Negative preference optimization by length, without the base (Fan et al. 2024, arXiv 2410.07163)."""

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from .recipe import UnlearningSettings, describe, learn, memory, prepare, run
from .story import story

__all__ = ["SimNpoSettings", "describe", "learn", "memory", "prepare", "run", "story"]


class SimNpoSettings(UnlearningSettings):
    """SimNPO (Fan et al. 2024, equation 5): ``-2/beta log sigmoid(-beta/|y| log p(y) - gamma)``, and the retain texts'
    NLL."""

    recipe = "simnpo"
    beta: float = Field(2.5, gt=0)
    """Inverse temperature. Higher values stop pushing an answer down sooner (paper, TOFU: 2.5)."""
    gamma: float = 0.0
    """Margin. Higher values push answers further down before the loss levels off (paper: 0)."""

    def forget_loss(self, nll: Tensor, lengths: Tensor, base_log_likelihoods: Tensor) -> Tensor:
        """Equation 5."""
        margin = self.beta * nll / lengths - self.gamma
        return (-2 / self.beta) * logsigmoid(margin).mean()
