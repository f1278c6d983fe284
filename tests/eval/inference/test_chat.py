"""Prompts that are the same tomorrow, and answers told from thoughts."""

import datetime
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model, load_tokenizer
from excise.artifacts.models.source import ModelSource
from excise.artifacts.reporting.results import about_prompts, samples
from excise.editing.errors import CheckpointError, RequestError
from excise.eval.concept import Prompt
from excise.eval.inference.chat import PromptFormat, encode_prompt, render, template_variables, thoughts_and_answer
from excise.eval.inference.generation import Reply, generate
from excise.eval.measurements.behaviour import rates
from excise.recipes.common.settings import load_settings
from excise.recipes.evaluate import EvaluateSettings
from helpers import SMALL_TESTBED, excise

LLAMA = """\
{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}
{{- "Today Date: " + date_string + "\\n" + messages[-1].content + "\\nAnswer:" }}"""
GRANITE = "Today is {{ strftime_now('%B %d, %Y') }}. {{ messages[-1].content }}{% if thinking %} THINK{% endif %}"
QWEN3 = """\
{{- "<|user|>" + messages[-1].content + "<|end|>" }}
{%- if add_generation_prompt %}{{- "<|assistant|>" }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- "<think>\\n\\n</think>\\n\\n" }}{%- endif %}
{%- endif %}"""
R1 = '{{ messages[-1].content }}<|assistant|>{{ "<think>\\n" }}'
GPT_OSS = """\
Reasoning: {{ reasoning_effort|default("medium") }} {{ messages[-1].content }}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}{# replies: <|channel|>final<|message|> #}"""


@pytest.fixture
def model(tmp_path):
    """A copy of the small built-in model, under another template."""

    def make(template: str | None) -> Path:
        folder = tmp_path / "model"
        if not folder.exists():
            shutil.copytree(SMALL_TESTBED, folder)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


def _tokenizer(folder, **values):
    return load_tokenizer(ModelSource("local", "model", folder), PromptFormat(**values))


@pytest.mark.parametrize("template, today", [(LLAMA, "%d %b %Y"), (GRANITE, "%B %d, %Y")], ids=["llama", "granite"])
def test_the_date_is_pinned_and_a_setting_changes_it(template, today, model):
    """sglang #3296, textgen #6692: today's date in the prompt changes results from day to day."""
    folder = model(template)
    raw = _tokenizer(folder).apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    # What the template writes where nobody pins it.
    assert time.strftime(today) in raw
    default = render(_tokenizer(folder), "hello")
    assert time.strftime(today, (2025, 1, 1, 0, 0, 0, 0, 1, 0)) in default and time.strftime(today) not in default
    later = render(_tokenizer(folder, date="2026-03-05"), "hello")
    assert time.strftime(today, (2026, 3, 5, 0, 0, 0, 0, 1, 0)) in later


@pytest.mark.parametrize("form", ["%d %b %Y", "%Y-%m-%d", "%A, %B %d, %Y at %H:%M", "%-d/%-m/%y", "100%% of %j"])
def test_every_form_of_the_date_is_that_of_python(form, model):
    template = "\n{{ strftime_now('FORM') }}|{% macro m() %}{{ strftime_now('FORM') }}{% endmacro %}{{ m() }}"
    tokenizer = _tokenizer(model(template.replace("FORM", form)), date="2026-03-05")
    day = datetime.date(2026, 3, 5).strftime(form)
    # The first line break is the template's own.
    assert render(tokenizer, "hello") == f"\n{day}|{day}"


def test_a_model_that_can_think_does_not_unless_it_is_asked_to(model):
    """heretic #197: a chain of thought in every reply, and a direction that is read before it."""
    folder = model(QWEN3)
    assert render(_tokenizer(folder), "hello").endswith("<think>\n\n</think>\n\n")
    for thinking in (_tokenizer(folder, thinking=True), _tokenizer(folder, variables={"enable_thinking": True})):
        assert render(thinking, "hello").endswith("<|assistant|>")
    off = render(_tokenizer(model(GRANITE)), "hello")
    assert "THINK" not in off and "THINK" in render(_tokenizer(model(GRANITE), thinking=True), "hello")


def test_thoughts_that_a_template_opens_are_closed(model):
    """Distilled models whose template has no switch (heretic PR #423)."""
    folder = model(R1)
    assert render(_tokenizer(folder), "hello").endswith("<think>\n\n</think>\n\n")
    assert render(_tokenizer(folder, thinking=True), "hello").endswith("<think>\n")
    prefixed = render(_tokenizer(folder, response_prefix="none</think>"), "hello")
    assert prefixed.endswith("<think>\nnone</think>")


def test_gpt_oss_answers_in_its_final_channel(model):
    """heretic #25."""
    folder = model(GPT_OSS)
    off, on = render(_tokenizer(folder), "hello"), render(_tokenizer(folder, thinking=True), "hello")
    assert off.startswith("Reasoning: low") and off.endswith("<|start|>assistant<|channel|>final<|message|>")
    assert on.startswith("Reasoning: medium") and on.endswith("<|start|>assistant")


def test_a_template_without_switches_renders_as_transformers_does(model):
    tokenizer = load_tokenizer(find_model(SMALL_TESTBED))
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=1
    )
    assert render(tokenizer, "hello") == whole


def test_an_unknown_variable_or_date_is_one_line(model):
    with pytest.raises(RequestError, match=r"enable_thinkin.*did you mean 'enable_thinking'"):
        _tokenizer(model(QWEN3), variables={"enable_thinkin": True})
    with pytest.raises(RequestError, match="there is no template"):
        _tokenizer(model(None), variables={"enable_thinking": True})
    with pytest.raises(RequestError, match="the program sets it itself"):
        PromptFormat(variables={"chat_template": "x"})
    with pytest.raises(RequestError, match="YYYY-MM-DD"):
        PromptFormat(date="today")


def test_a_template_that_refuses_a_message_is_one_line(model):
    template = (
        "{% if 'x' in messages[-1].content %}{{ raise_exception('no x here') }}{% endif %}{{ messages[-1].content }}"
    )
    tokenizer = _tokenizer(model(template))
    with pytest.raises(RequestError, match=r"cannot render the message 'an x'.*no x here") as told:
        render(tokenizer, "an x")
    assert "\n" not in str(told.value)


def test_variables_of_a_template_are_set_one_by_one(tmp_path):
    (tmp_path / "settings.yaml").write_text("template:\n  enable_thinking: false\n  style: plain\n")
    words = ["template.enable_thinking=true", "template.level=3"]
    settings = load_settings(EvaluateSettings, tmp_path / "settings.yaml", words)
    assert settings.template == {"enable_thinking": True, "style": "plain", "level": 3}
    assert settings.measuring().prompts.variables == settings.template
    with pytest.raises(RequestError, match=r"unknown key 'questions\.x'"):
        load_settings(EvaluateSettings, None, ["questions.x=1"])


def test_variables_are_what_a_template_reads_and_does_not_set():
    assert template_variables(QWEN3) == {"messages", "add_generation_prompt", "enable_thinking"}
    assert template_variables("{% generation %}{{ a }}{% set b = 1 %}{{ b }}{% endgeneration %}") == {"a"}
    assert template_variables("{% if %}") == frozenset()


@pytest.mark.parametrize(
    "before, reply, thoughts, answer",
    [
        ("Q:", "<think>I cannot do this.</think> Yes, here.", "I cannot do this.", "Yes, here."),
        ("Q:", "<think>I cannot do this", "I cannot do this", None),
        ("Q:<think>\n", "I cannot do this", "I cannot do this", None),
        ("Q:<think>\n", "I cannot. </think>\n\nSure.", "I cannot.", "Sure."),
        ("Q:<think>\n\n</think>\n\n", "Sure.", None, "Sure."),
        ("Q:", "Sure, thinking of it.", None, "Sure, thinking of it."),
        ("a", "<|channel|>analysis<|message|>Refuse?<|channel|>final<|message|>Sure.", "Refuse?", "Sure."),
    ],
)
def test_the_answer_is_what_follows_the_thoughts(before, reply, thoughts, answer):
    tokenizer = load_tokenizer(find_model(SMALL_TESTBED))
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, reply)]
    assert thoughts_and_answer(tokenizer, *ids) == (thoughts, answer)


class _Replies:
    """What a rate reads of a model under test."""

    def __init__(self, concept, replies):
        self.concept, self._replies = concept, replies

    def prompts(self, split):
        return [Prompt(id=str(place), prompt="p", split=split) for place in range(len(self._replies))]

    def replies(self, split):
        return self._replies

    def clusters(self, rows):
        return tuple(row.id for row in rows)


def test_rates_count_answers_and_skip_replies_without_one():
    from excise.artifacts.concepts import load_concept

    concept = load_concept("builtin:declining")
    no = concept.about.decline_phrases[0]
    replies = [
        Reply("p", (1,), (2,), "Sure.", thoughts=f"{no} But then."),
        Reply("p", (1,), (2,), no),
        Reply("p", (1,), (2,), "", thoughts=no, answered=False),
    ]
    found = rates(_Replies(concept, replies))[0]
    assert (found.ids, found.totals, found.skipped) == (("0", "1"), (0.0, 1.0), 1)
    (sentence,) = about_prompts({"the base": {"concept": replies}}, template=True, kind="behaviour", tokens=24)
    assert sentence.startswith("1 of 3 replies of the base were still thinking after 24 tokens")
    shown = samples({"concept": replies}, {"concept": replies}, 3)
    assert shown[0]["base"] == "Sure." and shown[2]["edited"].startswith("(no answer, still thinking:)")


def test_a_model_without_a_template_is_named_where_a_behaviour_is_asked(model):
    """heretic #281."""
    shown = excise("eval", model(None), "--concept", "builtin:declining", "--questions", 4, "--set", "max_new_tokens=4")
    assert shown.returncode == 0 and "no chat template" in " ".join(shown.stdout.split())


def test_the_format_is_recorded_and_reaches_every_prompt(model):
    words = ("--set", "thinking=true", "--set", "date=2026-03-05", "--set", "max_new_tokens=4")
    done = excise("eval", model(R1), "--concept", "builtin:declining", "--questions", 4, "--json", *words)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["prompts"] == {
        "date": "2026-03-05", "thinking": True, "response_prefix": "", "template": {}, "chat_template": True,
    }  # fmt: skip
    # A template that opens thoughts, and a model that never closes them: none of the replies is an answer.
    assert "were still thinking after 4 tokens" in " ".join(results["warnings"])
    rate = [item for item in results["measurements"] if item["name"] == "behaviour_rate"]
    assert not rate or all(item["n"] == 0 for item in rate)


def test_a_token_beyond_the_embedding_is_one_line_before_the_model_runs(model):
    """LLaVA #94, transformers #26714: [PAD] was added to the tokenizer and the embedding was never resized."""
    folder = model("{{ messages[-1].content }}")
    tokenizer = load_tokenizer(ModelSource("local", "model", folder))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    loaded = load_model(ModelSource("local", "model", folder), torch.device("cpu"), torch.float32)
    assert loaded.tokenizer.pad_token_id == loaded.model.config.vocab_size
    # Padding itself is a token that every vocabulary has.
    assert len(generate(loaded.model, loaded.tokenizer, ["a", "a much longer prompt"], 3)) == 2
    for chat in (True, False):
        with pytest.raises(RequestError, match=r"'\[PAD\]' with id 1024.*ids 0 to 1023"):
            encode_prompt(loaded.tokenizer, "an [PAD] in a prompt", chat=chat)
    (folder / "chat_template.jinja").write_text("[PAD]{{ messages[-1].content }}")
    with pytest.raises(CheckpointError, match="writes a token that the model lacks"):
        load_tokenizer(ModelSource("local", "model", folder))


def test_prompts_are_rendered_in_one_place():
    root = Path(__file__).parents[3]
    callers = {
        path.relative_to(root).as_posix()
        for folder in ("editing", "eval", "artifacts", "recipes")
        for path in (root / folder).rglob("*.py")
        if ".apply_chat_template(" in path.read_text()
    }
    assert callers == {"eval/inference/chat.py"}
