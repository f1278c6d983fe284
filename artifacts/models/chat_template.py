"""Chat templates are programs that come with a model: tried once, with limits, before any prompt is rendered."""

import hashlib
import json
import subprocess
import sys
from typing import Any

from ...editing.errors import CheckpointError, RequestError, one_line
from ...eval.inference.chat import PromptFormat, encode_prompt, use_format
from ...eval.inference.encoding import UnknownToken
from ..files.written import write_whole
from .cache import cache_folder

SECONDS, MOST_BYTES, MOST_CHARACTERS = 5, 1 << 30, 1_000_000
_USER = {"role": "user", "content": "Is this a question?"}
CONVERSATIONS: list[list[dict[str, str]]] = [
    [_USER],
    [{"role": "system", "content": "Be brief."}, _USER],
    [_USER, {"role": "assistant", "content": "Yes."}, _USER],
]
# The environment is that of transformers. A template's own refusal, such as of a system message, is no fault.
_TRIAL = """
import json, resource, sys
seconds, memory, most = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
class Generation(Extension):
    tags = {"generation"}
    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)
def refuse(message):
    raise TemplateError(message)
given = json.load(sys.stdin)
options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": [Generation, "jinja2.ext.loopcontrols"]}
environment = ImmutableSandboxedEnvironment(**options)
environment.filters["tojson"] = lambda value, **_: json.dumps(value)
environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: form}
for conversation in given["conversations"]:
    try:
        template = environment.from_string(given["template"])
        length = 0
        for part in template.generate(messages=conversation, add_generation_prompt=True, **given["tokens"]):
            length += len(part)
            if length > most:
                sys.exit(3)
    except MemoryError:
        sys.exit(4)
    except (RecursionError, OverflowError):
        sys.exit(5)
    except Exception:
        pass
"""
_REASONS = {
    3: f"writes more than {MOST_CHARACTERS} characters",
    4: "takes too much memory",
    5: "calls itself without end",
}


def check_chat_template(tokenizer: Any, name: str, prompts: PromptFormat) -> None:
    """Try every chat template of a tokenizer on short conversations; from then on its prompts are rendered so.

    Raises:
        RequestError: The template knows no variable that ``prompts`` sets.
        CheckpointError: A template loops, writes or takes too much, or cannot render a user's message.
    """
    templates = tokenizer.chat_template
    if not templates:
        use_format(tokenizer, prompts)
        return
    named = templates if isinstance(templates, dict) else {"default": templates}
    for template in named.values():
        if not isinstance(template, str):
            raise CheckpointError(
                f"{name} has a chat template that is {one_line(ValueError(repr(template)), 40)}, not a text; fetch the"
                " tokenizer again"
            )
        if reason := _fault(template, tokenizer):
            raise CheckpointError(f"the chat template of {name} {reason}; correct it or fetch the tokenizer again")
    use_format(tokenizer, prompts)
    try:
        encode_prompt(tokenizer, _USER["content"])
    except UnknownToken as error:
        raise CheckpointError(
            f"the chat template of {name} writes a token that the model lacks ({str(error).partition(';')[0]}); give the model whose embedding"
            " was resized with it, or its first tokenizer"
        ) from error
    except RequestError as error:
        cause = error.__cause__ or error
        raise CheckpointError(
            f"the chat template of {name} cannot render a user's message ({one_line(cause, 120)}); correct it, change a"
            " template.NAME setting, or fetch the tokenizer again"
        ) from error


def _fault(template: str, tokenizer: Any) -> str:
    """Why a template cannot be used; empty if it can. A template that passed once is not tried again."""
    tokens = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    given = json.dumps({"template": template, "conversations": CONVERSATIONS, "tokens": tokens})
    passed = cache_folder() / "chat-templates" / hashlib.sha256((given + _TRIAL).encode()).hexdigest()
    if passed.exists():
        return ""
    command = [sys.executable, "-I", "-c", _TRIAL, *map(str, (SECONDS, MOST_BYTES, MOST_CHARACTERS))]
    try:
        done = subprocess.run(command, input=given.encode(), capture_output=True, timeout=3 * SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"runs for more than {SECONDS} seconds"
    if done.returncode < 0:
        return f"runs for more than {SECONDS} seconds"
    if done.returncode:
        return _REASONS.get(done.returncode, "cannot be tried within its limits of memory")
    write_whole(passed, "")
    return ""
