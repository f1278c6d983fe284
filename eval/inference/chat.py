"""Prompts in a model's chat template: one place for all that a template can be told, so that they are the same tomorrow.

Templates are programs. Some write today's date into every prompt, some let the model think before it answers. Here the
date is a setting, thoughts are off unless they are asked for, and every variable of a template can be set.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from typing import Any

from ...editing.errors import RequestError, nearest, one_line
from .encoding import encode

DATE = "2025-01-01"
"""The date that templates write, unless a setting says another: results must not change from day to day."""
SWITCHES: dict[str, tuple[Any, Any]] = {
    "enable_thinking": (False, True),  # Qwen3, SmolLM3, GLM
    "thinking": (False, True),  # Granite, DeepSeek V3.1
}
"""Variables of templates that turn thoughts off and on."""
MARKS = (
    ("<think>", "</think>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
)
"""What stands before and behind a model's thoughts."""
_CHANNELS, _FINAL = "<|channel|>", "<|channel|>final<|message|>"
RESERVED = (
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "strftime_now", "raise_exception",
)  # fmt: skip
"""What templates are given by the program itself, and how their text is used."""
_FORMAT = "excise_prompt_format"
"""Attribute of a tokenizer that holds its ``PromptFormat``."""


@dataclass(frozen=True)
class PromptFormat:
    """How prompts are put into a chat template."""

    date: str = DATE
    """What templates take for today, as YYYY-MM-DD."""
    thinking: bool = False
    """Let the model think before it answers, where its template has a switch for it."""
    response_prefix: str = ""
    """Text that every reply goes on from; empty closes thoughts that a template opens, unless ``thinking``."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Further variables for the template."""

    def __post_init__(self) -> None:
        try:
            date.fromisoformat(self.date)
        except ValueError as error:
            raise RequestError(f"date={self.date!r:.40} is no date; write YYYY-MM-DD, such as {DATE}") from error
        if taken := [name for name in self.variables if name in RESERVED]:
            raise RequestError(
                f"template.{taken[0]} is not a variable of a template, the program sets it itself; leave it out"
            )

    def as_json(self) -> dict[str, Any]:
        """For ``eval.json``."""
        return {
            "date": self.date,
            "thinking": self.thinking,
            "response_prefix": self.response_prefix,
            "template": dict(self.variables),
        }


def use_format(tokenizer: Any, form: PromptFormat) -> None:
    """Let every prompt of a tokenizer be rendered so.

    Raises:
        RequestError: Its template knows no such variable.
    """
    template = default_template(tokenizer)
    known = template_variables(template) if template else frozenset()
    for name in form.variables:
        if name not in known:
            has = f"its variables: {', '.join(sorted(known - {'messages'}))}" if template else "there is no template"
            raise RequestError(
                f"template.{name}: the chat template knows no such variable{nearest(name, sorted(known))}; {has}"
            )
    setattr(tokenizer, _FORMAT, form)


def format_of(tokenizer: Any) -> PromptFormat:
    """How a tokenizer's prompts are rendered."""
    form: PromptFormat = getattr(tokenizer, _FORMAT, PromptFormat())
    return form


def render(tokenizer: Any, prompt: str) -> str:
    """The prompt in the model's chat template, up to the start of the reply.

    Raises:
        RequestError: The template fails on it.
    """
    text = render_messages(tokenizer, [{"role": "user", "content": prompt}], reply=True)
    return text + _opening(text, default_template(tokenizer) or "", format_of(tokenizer))


def render_messages(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, reply: bool) -> str:
    """Messages in the chat template.

    Args:
        reply: With what stands before the next reply.

    Raises:
        RequestError: The template fails on them.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=reply,
            **_told(default_template(tokenizer) or "", format_of(tokenizer)),
        )
    except Exception as error:  # whatever a program may raise
        raise RequestError(
            f"the chat template cannot render the message {str(messages[-1].get('content', ''))!r:.60}"
            f" ({one_line(error, 120)}); change the message, a template.NAME setting, or the template"
        ) from error
    return text


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool = True, beginning: str = "") -> list[int]:
    """Token ids of a prompt, in the chat template if there is one and ``chat`` is true.

    Args:
        beginning: Text that the reply goes on from.
    """
    # Chat templates write the begin token themselves; the tokenizer must not add a second one.
    if not (chat and tokenizer.chat_template):
        return encode(tokenizer, prompt + beginning)
    return encode(tokenizer, render(tokenizer, prompt) + beginning, special=False)


def thoughts_and_answer(tokenizer: Any, prompt_ids: Sequence[int], ids: Sequence[int]) -> tuple[str | None, str | None]:
    """What a reply thinks, None where it does not, and what it answers, None where its thoughts never end."""
    whole = str(tokenizer.decode(ids, skip_special_tokens=False))
    before = str(tokenizer.decode(prompt_ids[-16:], skip_special_tokens=False)).rstrip()
    for opening, closing in MARKS:
        thoughts, closed, answer = whole.rpartition(closing)
        if closed:
            return _plain(tokenizer, thoughts), _plain(tokenizer, answer)
        if before.endswith(opening) or whole.lstrip().startswith(opening):
            return _plain(tokenizer, whole), None
    return None, str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def default_template(tokenizer: Any) -> str | None:
    """The template that prompts are rendered in."""
    templates = tokenizer.chat_template
    return templates.get("default") if isinstance(templates, dict) else templates


@lru_cache(maxsize=64)
def template_variables(template: str) -> frozenset[str]:
    """Names that a template reads and does not set itself; none where it cannot be parsed."""
    from jinja2 import TemplateError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # As in transformers, where {% generation %} marks replies; what it encloses reads the same.
    text = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    text = text.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    try:
        tree = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
        return frozenset(meta.find_undeclared_variables(tree))
    except (TemplateError, RecursionError):
        return frozenset()


def _told(template: str, form: PromptFormat) -> dict[str, Any]:
    """The variables that a template is given."""
    known, today = template_variables(template), date.fromisoformat(form.date)
    told: dict[str, Any] = {name: switch[form.thinking] for name, switch in SWITCHES.items() if name in known}
    if "strftime_now" in known:
        told["chat_template"] = _dated(template, today)
    if "date_string" in known:
        told["date_string"] = today.strftime("%d %b %Y")
    if "reasoning_effort" in known and _CHANNELS in template and not form.thinking:
        told["reasoning_effort"] = "low"
    return told | dict(form.variables)


@lru_cache(maxsize=64)
def _dated(template: str, today: date) -> str:
    """A template in which ``strftime_now`` tells a fixed day: transformers passes no functions on to templates."""
    parts = {f"%{letter}": today.strftime(f"%{letter}") for letter in "aAwdbBmyYHIpMSjUWGuVcxX"}
    parts |= {"%-d": str(today.day), "%-m": str(today.month), "%e": f"{today.day:2d}", "%%": "%"}
    steps = "".join(f" | replace({part!r}, {value!r})" for part, value in parts.items())
    # The last expression keeps a first line break of the template, which a block's end would swallow.
    return f"{{% macro strftime_now(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}{{{{ '' }}}}{template}"


def _opening(text: str, template: str, form: PromptFormat) -> str:
    """What stands between a rendered prompt and the reply."""
    if form.response_prefix or form.thinking:
        return form.response_prefix
    for opening, closing in MARKS:
        if text.rstrip().endswith(opening):
            return f"{'' if text.endswith(chr(10)) else chr(10)}\n{closing}\n\n"
    # gpt-oss has no switch; a reply that begins in its final channel has no other.
    return _FINAL if _CHANNELS in template and text.endswith("<|start|>assistant") else ""


def _plain(tokenizer: Any, text: str) -> str:
    for mark in {*tokenizer.all_special_tokens, *(opening for opening, _ in MARKS)}:
        text = text.replace(mark, "")
    return text.strip()
