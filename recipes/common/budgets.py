"""How much a recipe spends: what each budget sets of its settings, and of the measuring that all recipes share."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from .run_folder import RunSettings

Budgets = Mapping[str, Mapping[str, Any]]
"""By the name of a budget, the settings that it sets."""
MEASURED: Budgets = {
    "quick": {"questions": 60, "max_new_tokens": 16, "kl_prompts": 16},
    "long": {"max_new_tokens": 64, "kl_prompts": 256},
}
"""What a budget sets of the measuring, for every recipe."""


class BudgetSettings(RunSettings):
    """Settings of every recipe that has budgets."""

    budgets: ClassVar[Budgets] = {}
    """What a budget sets of the recipe's own settings; all set ``MEASURED`` too."""
    budget: Literal["quick", "standard", "long"] = "standard"
    """How much time to spend: a first look, the defaults, or more of everything. Settings that you give explicitly
    win."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_budget(cls, values: Any) -> Any:
        # Before the values are checked, so that settings which were given win over the budget's.
        return {**cls.set_by(str(values.get("budget"))), **values} if isinstance(values, dict) else values

    @classmethod
    def set_by(cls, budget: str) -> dict[str, Any]:
        """What a budget sets; the standard one leaves every default."""
        return {**MEASURED.get(budget, {}), **cls.budgets.get(budget, {})}

    def set_by_budget(self) -> dict[str, Any]:
        """The settings that the budget is about, with the values that the run takes."""
        return {key: getattr(self, key) for key in self.set_by(self.budget)}

    def budget_in_words(self) -> str:
        """The budget's name with these values."""
        values = ", ".join(f"{key} {value}" for key, value in self.set_by_budget().items())
        return f"{self.budget} ({values})" if values else self.budget
