"""The figures of a base, measured once for all runs on the same weights, pack, settings and code.

They lie in the user's cache folder: deleting them only costs time.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from ...artifacts.checkpoints.tensor_cache import TensorCache, scope_of
from ...artifacts.models.cache import cache_folder
from ...artifacts.models.source import ModelSource
from ...eval.concept import Concept, Prompt, RetainText
from ...eval.inference.generation import Reply
from ...eval.inference.kept import Kept
from ...eval.items import MEASURED_ROWS
from ...eval.model_under_test import Baseline, EvalSettings
from ...eval.statistics import Scores
from .run_inputs import code_digest

log = logging.getLogger(__name__)
LARGEST = 1 << 30
"""Bytes of figures that are kept; larger ones are measured again."""
COMPUTES = ("editing", "eval", "artifacts/models")
"""Folders whose code decides what a measurement of a base is."""


@dataclass(frozen=True)
class Measured:
    """What was measured on one model, all that is needed of it once it is unloaded."""

    scores: list[Scores]
    replies: dict[str, list[Reply]]
    baseline: Baseline | None = None
    """Of the base: what others are compared with."""
    chat_template: bool = True
    """Whether the model has a chat template; otherwise prompts are plain texts."""
    set_aside: dict[str, Any] = field(default_factory=dict)
    """Of the base: what its generation_config asks for, which replies were measured without."""


@dataclass(frozen=True)
class _Stored:
    """What is kept beside tensors."""

    scores: list[Scores]
    replies: dict[str, list[Reply]]
    chat_template: bool
    set_aside: dict[str, Any]
    along: list[Reply]
    texts: list[Reply]
    prompts: tuple[Prompt, ...]
    rows: tuple[RetainText, ...]
    vocabulary: int


_STORED = TypeAdapter(_Stored)
_WORDS = "words"


@dataclass(frozen=True)
class BaseFigures:
    """Where the figures of one base on one pack are kept."""

    cache: TensorCache

    @classmethod
    def of(
        cls, source: ModelSource, dtype: torch.dtype, device: torch.device, concept: Concept, settings: EvalSettings
    ) -> "BaseFigures":
        """Args:
        concept: With the items that are measured: half of a pack is another pack.
        settings: How much is measured.
        """
        rows = [[row.id for row in getattr(concept, name)] for name in MEASURED_ROWS]
        items = hashlib.sha256(repr((rows, concept.measured_texts)).encode()).hexdigest()
        scope = (scope_of(source.folder, dtype, device), concept.sha256, concept.made, items, settings)
        return cls(TensorCache(cache_folder() / "base-figures", repr((*scope, code_digest(COMPUTES)))))

    def recall(self) -> Measured | None:
        """What an earlier run measured; None where none did, or what it left cannot be read."""
        tensors = self.cache.get()
        if tensors is None:
            return None
        try:
            stored = _STORED.validate_json(bytes(tensors.pop(_WORDS).numpy()))
            along = _distributions(tensors, "along", len(stored.along), stored.vocabulary)
            texts = _distributions(tensors, "texts", len(stored.texts), stored.vocabulary)
        except (KeyError, ValidationError):
            # Of another version, or damaged: measured again and written anew.
            return None
        baseline = Baseline(stored.along, along, stored.texts, texts, stored.prompts, stored.rows)
        return Measured(stored.scores, stored.replies, baseline, stored.chat_template, stored.set_aside)

    def keep(self, measured: Measured) -> None:
        """Keep what was measured, for runs to come."""
        baseline = measured.baseline
        assert baseline is not None, "of a base alone"
        both = {"along": baseline.distributions, "texts": baseline.text_distributions}
        tensors = {
            f"{name}.{place}.{part}": tensor
            for name, distributions in both.items()
            for place, one in enumerate(distributions)
            for part, tensor in (("log_p", one.log_p), ("ids", one.ids))
            if tensor is not None
        }
        if sum(tensor.nbytes for tensor in tensors.values()) > LARGEST:
            log.info("the base's figures are larger than %.0f MB, so the next run measures them again", LARGEST / 1e6)
            return
        vocabulary = next((one.vocabulary for every in both.values() for one in every), 0)
        stored = _Stored(
            measured.scores,
            measured.replies,
            measured.chat_template,
            measured.set_aside,
            baseline.replies,
            baseline.texts,
            baseline.prompts,
            baseline.rows,
            vocabulary,
        )
        words = torch.frombuffer(bytearray(_STORED.dump_json(stored)), dtype=torch.uint8)
        self.cache.put({_WORDS: words, **tensors})


def _distributions(tensors: Mapping[str, Tensor], name: str, count: int, vocabulary: int) -> list[Kept]:
    return [
        Kept(tensors[f"{name}.{place}.log_p"], tensors.get(f"{name}.{place}.ids"), vocabulary) for place in range(count)
    ]
