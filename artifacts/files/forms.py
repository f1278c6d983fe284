"""What a file must hold, field by field, before anything is computed from it."""

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .opened import Unreadable


class Form(BaseModel):
    """Fields of a JSON object, each of exactly its type; further fields are allowed, numbers are finite."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False, protected_namespaces=())


T = TypeVar("T", bound=BaseModel)


def validated(kind: type[T], content: Any) -> T:
    """The content as the form reads it.

    Raises:
        Unreadable: A field is missing or of another type or range; the message names it.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in detail["loc"]) or "the whole"
        message = str(detail["msg"]).removeprefix("Value error, ")
        value = f", got {detail['input']!r:.60}" if detail["type"] != "missing" else ""
        raise Unreadable(f"{where}: {message[0].lower()}{message[1:]}{value}") from error
