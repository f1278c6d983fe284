"""A chat template is a program: one that loops or writes without end is refused before it is used."""

import shutil
import time

import pytest
from excise.artifacts.models.chat_template import SECONDS
from excise.artifacts.models.load import load_tokenizer
from excise.artifacts.models.source import ModelSource
from excise.editing.errors import CheckpointError
from helpers import SMALL_TESTBED

PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}\n{% endfor %}"


def _tokenizer(tmp_path, template):
    shutil.copytree(SMALL_TESTBED, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    return load_tokenizer(ModelSource("local", "model", tmp_path / "model"))


@pytest.mark.parametrize(
    "template",
    [
        PLAIN,
        # A template may refuse what it does not know.
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN,
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
    ],
)
def test_an_ordinary_template_is_used(tmp_path, template):
    tokenizer = _tokenizer(tmp_path, template)
    assert "hello" in tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)


@pytest.mark.parametrize(
    "template, told",
    [
        ("{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "writes more than 1000000 characters"),
        ("{{ 'x' * 10**9 }}", "writes more than|takes too much memory|limits of memory"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "calls itself without end"),
        ("{% for m in messages %}", "cannot render a user's message"),
        ("{{ messages[9]['content'].x.y }}", "cannot render a user's message"),
    ],
)
def test_a_template_without_bounds_is_one_line(tmp_path, template, told):
    with pytest.raises(CheckpointError, match=told) as caught:
        _tokenizer(tmp_path, template)
    assert "\n" not in str(caught.value)


def test_a_template_that_loops_is_stopped(tmp_path):
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}"
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=f"runs for more than {SECONDS} seconds"):
        _tokenizer(tmp_path, loops)
    assert time.monotonic() - started < 4 * SECONDS
