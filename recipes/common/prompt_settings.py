"""How prompts are put into chat templates, as settings of every command that asks a model something."""

from typing import Any, Self

from pydantic import model_validator

from ...eval.inference.chat import DATE, PromptFormat
from .settings import Settings


class PromptSettings(Settings):
    """Settings of whatever renders prompts."""

    date: str = DATE
    """Date that chat templates take for today, as YYYY-MM-DD. Fixed, so that results are the same tomorrow."""
    thinking: bool = False
    """Let models think before they answer, where their chat template has a switch. Needs a larger max_new_tokens."""
    response_prefix: str = ""
    """Text that every reply goes on from. Empty closes thoughts that a template opens, unless thinking=true."""
    template: dict[str, Any] = {}  # noqa: RUF012  pydantic copies defaults
    """Further variables of the chat template, such as template.enable_thinking=true; one --set each."""

    @model_validator(mode="after")
    def _check_format(self) -> Self:
        self.prompt_format()
        return self

    def prompt_format(self) -> PromptFormat:
        """How prompts are rendered."""
        return PromptFormat(self.date, self.thinking, self.response_prefix, self.template)
