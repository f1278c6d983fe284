"""What the steps of one ELM run share."""

from dataclasses import dataclass, replace
from typing import Any

from ...editing.training.edited_target import TargetEdit
from ...eval.concept import Concept
from ..common.tokens import text_limit
from ..data.facts import Facts
from .request import ElmSettings
from .teacher import Teacher


@dataclass(frozen=True)
class Erasure:
    """A frozen model as the teacher, what it is to forget, and how that is asked for."""

    teacher: Teacher
    tokenizer: Any
    concept: Concept
    facts: Facts
    settings: ElmSettings

    @property
    def model(self) -> Any:
        return self.teacher.model

    @property
    def strength(self) -> float:
        """The strength in use; where ``auto`` was asked for, the target check has put a number in its place."""
        assert self.settings.strength != "auto", "the target check comes first"
        return self.settings.strength

    @property
    def edit(self) -> TargetEdit:
        """How the frozen model's predictions are edited."""
        settings = self.settings
        return TargetEdit(
            self.strength, settings.one_sided, settings.strength_ramp, settings.temperature, settings.target_top_k
        )

    @property
    def drawn(self) -> TargetEdit:
        """What continuations are drawn from: the edited distribution at its full strength, or a plain one at another
        strength."""
        strength = self.settings.fluency_strength
        return replace(self.edit, ramp=False) if strength is None else TargetEdit(strength)

    @property
    def text_limit(self) -> int:
        """Tokens of a text that are read at once."""
        return text_limit(self.model)

    def at(self, strength: float) -> "Erasure":
        """The same at one strength."""
        return replace(self, settings=self.settings.model_copy(update={"strength": strength}))
