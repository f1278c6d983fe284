"""Unlearning by the Jensen-Shannon divergence (Singh et al. 2025, arXiv 2509.02820)."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ...artifacts.models.load import LoadedModel
from ...editing.errors import RequestError
from ...editing.modules import unembedding
from ...editing.training.jensen_shannon import between_hidden, from_certain
from ..common.examples import scored_hidden, token_nats
from ..common.tokens import Row, encode
from ..common.trainer import Loss, Terms
from .recipe import UnlearningData, UnlearningJob, UnlearningSettings, describe, learn, memory, prepare, run
from .story import story

__all__ = ["JensunSettings", "describe", "learn", "memory", "prepare", "run", "story"]


class JensunSettings(UnlearningSettings):
    """JensUn (Singh et al. 2025, section 3): ``JSD(p_forget, refusal) + JSD(p_retain, p_base)`` at each token; both
    are at most log 2."""

    recipe = "jensun"
    refusal: str = Field("No idea", min_length=1)
    """What is learned instead of answers, its tokens repeated as often as an answer is long (paper: No idea)."""

    def loss(self, job: UnlearningJob, loaded: LoadedModel, data: UnlearningData) -> Loss:
        """Section 3."""
        # With a space in front, because that is how an answer goes on from its context.
        refusal = encode(loaded.tokenizer, f" {self.refusal.strip()}", False)
        if not refusal:
            raise RequestError(f"refusal={self.refusal!r} has no token; give a word or more, such as No idea")
        return JensunLoss(self.retain_weight, refusal)


class JensunLoss:
    """Mean over sequences of the mean divergence over their tokens."""

    def __init__(self, retain_weight: float, refusal: Row):
        self.retain_weight, self.refusal = retain_weight, torch.tensor(refusal)

    def __call__(self, model: Any, batch: dict[str, Any]) -> Terms:
        rows, lengths, n = batch["rows"], batch["lengths"], batch["forget"]
        hidden = scored_hidden(model, batch)
        is_forget = rows < n
        log_p = -token_nats(hidden[is_forget], model, self._targets(lengths[:n]).to(rows.device))
        with torch.no_grad(), model.disable_adapter():
            base = scored_hidden(model, batch)
        kept = between_hidden(hidden[~is_forget], base[~is_forget], unembedding(model))
        forget = _mean_of_rows(from_certain(log_p), rows[is_forget], lengths[:n])
        retain = _mean_of_rows(kept, rows[~is_forget] - n, lengths[n:])
        return {"forget": forget, "retain": self.retain_weight * retain}

    def _targets(self, lengths: Tensor) -> Tensor:
        """The refusal's tokens over and over, anew for each answer."""
        return torch.cat([self.refusal[torch.arange(length) % len(self.refusal)] for length in lengths.tolist()])


def _mean_of_rows(values: Tensor, rows: Tensor, lengths: Tensor) -> Tensor:
    sums = values.new_zeros(len(lengths)).index_add(0, rows, values)
    return (sums / lengths.to(values.device)).mean()
