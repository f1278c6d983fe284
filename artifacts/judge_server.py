"""Judges behind an OpenAI-compatible server: asked with retries, remembered on disk, with the tokens that it cost."""

import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.message import Message
from functools import partial
from http.client import HTTPException
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field

from ..editing.errors import ExciseError, RequestError, one_line
from .files.forms import Form, validated
from .files.opened import Unreadable
from .files.parsed import parsed_object
from .files.written import read_sealed, write_sealed
from .models.cache import cache_folder

TRIES = 6
"""How often one reply is asked for before the evaluation ends."""
AT_ONCE = 8
"""Requests that are under way together."""
SECONDS = 120
"""Without an answer for so long, a request counts as failed."""
LONGEST_PAUSE = 60.0
LARGEST = 1 << 24
"""Bytes of an answer that are read, at most."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
PASSING = (408, 409, 425, 429)
"""Statuses below 500 after which the same request may succeed."""


class _Message(Form):
    content: str | None = None
    """None where the server's model declines to grade."""


class _Choice(Form):
    message: _Message


class _Usage(Form):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Answer(Form):
    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _Usage | None = None


class _Remembered(Form):
    text: str
    prompt_tokens: int
    reply_tokens: int


@dataclass(frozen=True)
class JudgeServer:
    """A model behind a server that speaks OpenAI's chat completions."""

    url: str
    """Up to and without ``/chat/completions``."""
    model: str
    key: str | None = field(default=None, repr=False)
    pause: float = 1.0
    """Seconds before the second try; doubled before each further one."""

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.model} at {urlsplit(self.url).hostname}"


@dataclass(frozen=True)
class Judgements:
    """What a judge said, and what it cost."""

    texts: tuple[str, ...]
    prompt_tokens: int
    reply_tokens: int
    remembered: int
    """Replies that were on disk already and cost nothing."""


def is_address(reference: str) -> bool:
    """Whether a judge is a server, not a model on this machine."""
    return reference.startswith(("http://", "https://"))


def find_judge_server(reference: str, key_variable: str | None = None) -> JudgeServer:
    """A judge by its address and model, such as ``http://localhost:8000/v1#MODEL``.

    Args:
        reference: Address and model.
        key_variable: Environment variable that holds the server's key; None for a server that asks for none.

    Raises:
        RequestError: The model or the key is missing, or the key would travel unencrypted.
    """
    url, _, model = reference.partition("#")
    host = urlsplit(url).hostname
    if not host or not model:
        raise RequestError(
            f"judge {reference!r} names no model; write the server and the model as http://HOST/v1#MODEL"
        )
    key = os.environ.get(key_variable) if key_variable else None
    if key_variable and not key:
        raise RequestError(f"judge_key: the environment variable {key_variable} is empty; put the server's key into it")
    if key and url.startswith("http://") and host not in LOOPBACK:
        raise RequestError(f"judge {url} would get the key unencrypted; use https://, or a server on this machine")
    return JudgeServer(url.rstrip("/"), model, key)


def ask(judge: JudgeServer, prompts: Sequence[str], advance: Callable[[int], None] = lambda _: None) -> Judgements:
    """Put prompts to a judge; what it said before to the same prompt is taken from disk.

    Args:
        judge: Server and model.
        prompts: One user message each.
        advance: Called with 1 after each reply, for progress.

    Raises:
        ExciseError: The server refuses, or cannot be reached after six tries.
    """

    found = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for reply in pool.map(partial(_ask, judge), prompts):
                found.append(reply)
                advance(1)
        except BaseException:
            # Without this, all other prompts would still be asked before the error is shown.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    fresh = [reply for reply, remembered in found if not remembered]
    return Judgements(
        tuple(reply.text for reply, _ in found),
        sum(reply.prompt_tokens for reply in fresh),
        sum(reply.reply_tokens for reply in fresh),
        len(found) - len(fresh),
    )


def _ask(judge: JudgeServer, prompt: str) -> tuple[_Remembered, bool]:
    body = {"model": judge.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
    digest = hashlib.sha256(json.dumps([judge.url, body], sort_keys=True).encode()).hexdigest()
    place = cache_folder() / "judge" / f"{digest}.json"
    try:
        return validated(_Remembered, read_sealed(place)), True
    except (Unreadable, OSError):
        pass  # It was never asked, or the file is damaged; then it is asked again.
    answer = _answer(judge, json.dumps(body).encode())
    usage = answer.usage or _Usage()
    content = {
        "text": answer.choices[0].message.content or "",
        "prompt_tokens": usage.prompt_tokens,
        "reply_tokens": usage.completion_tokens,
    }
    write_sealed(place, content)
    return validated(_Remembered, content), False


def _answer(judge: JudgeServer, body: bytes) -> _Answer:
    """The server's answer, after as many tries as it takes."""
    pause, reason = judge.pause, ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(min(pause, LONGEST_PAUSE))
            pause *= 2
        try:
            return validated(_Answer, parsed_object(_post(judge, body)))
        except urllib.error.HTTPError as error:
            said = one_line(ValueError(error.read(LARGEST).decode("utf-8", "replace") or error.reason), 120)
            reason = f"it answered {error.code}: {said.replace(judge.key, '…') if judge.key else said}"
            if error.code < 500 and error.code not in PASSING:
                raise RequestError(
                    f"judge {judge.name} refuses ({reason}); check the address, the model's name and judge_key"
                ) from error
            pause = max(pause, _asked_pause(error.headers))
        except Unreadable as error:
            reason = f"its answer is no chat completion: {error}"
        except (OSError, HTTPException, ValueError) as error:
            reason = one_line(error, 120)
    raise ExciseError(
        f"judge {judge.name} gave no answer in {TRIES} tries ({reason}); run the same command again: what it answered is"
        " remembered"
    )


def _post(judge: JudgeServer, body: bytes) -> str:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {judge.key}"} if judge.key else {})}
    request = urllib.request.Request(f"{judge.url}/chat/completions", body, headers, method="POST")
    with _OPENER.open(request, timeout=SECONDS) as response:
        return str(response.read(LARGEST).decode("utf-8"))


def _asked_pause(headers: Message) -> float:
    """Seconds that the server asks to wait."""
    try:
        return min(LONGEST_PAUSE, max(0.0, float(headers.get("Retry-After", ""))))
    except ValueError:
        return 0.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)
