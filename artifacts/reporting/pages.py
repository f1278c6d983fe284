"""What all HTML pages share: one look, and texts of models and users shown as inert data."""

import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

MAX_TEXT = 2000
"""Characters of one prompt or reply that a page shows; the rest is counted."""


def render(template: str, **values: Any) -> str:
    """Fill in a page; whatever is not marked safe is escaped and shows its control characters."""
    environment = Environment(
        loader=PackageLoader(__package__.rpartition(".")[0], "templates"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        # Exactly str: Markup is a subclass, and what is marked safe must stay as it is.
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters["inline"] = inline
    return environment.get_template(template).render(clean=clean, **values)


def inline(text: str) -> Markup:
    """A text of ours with its marks as HTML: bold, emphasis and code. Everything else in it is inert."""

    def marked(match: re.Match[str]) -> str:
        tag = {1: "code", 2: "strong", 3: "em"}[match.lastindex or 0]
        return f"<{tag}>{match[match.lastindex or 0]}</{tag}>"

    marks = r"`([^`]+)`|\*\*(?=\S)([^*]+)(?<=\S)\*\*|\*(?=\S)([^*]+)(?<=\S)\*"
    # Escaped first: the marks of a text become tags, and whatever else is in it stays text.
    return Markup(re.sub(marks, marked, str(escape(visible(text)))))


def visible(text: str) -> str:
    """Control and bidirectional characters, which could hide or reorder what stands around them, as a mark."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", "�", text)


def clean(text: str) -> str:
    """A text cut to what someone would read."""
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}… ({len(text) - MAX_TEXT} more characters)"
