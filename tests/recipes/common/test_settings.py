import importlib
import os

import pytest
from excise.editing.architectures import layer_selection
from excise.editing.errors import RequestError
from excise.recipes import RECIPES
from excise.recipes.common import adapter_job
from excise.recipes.common.settings import load_settings, settings_help
from excise.recipes.elm.request import ElmSettings
from excise.recipes.orthogonalize.recipe import OrthogonalizeSettings
from helpers import SMALL_TESTBED


def _load(tmp_path, text="", assignments=(), **flags):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_settings(OrthogonalizeSettings, path, list(assignments), flags)


def test_flags_win_over_assignments_over_the_file_over_defaults(tmp_path):
    made = _load(tmp_path, "seed: 1\nmax_kl: 0.5\nmodel: a/b\n", ["seed=2", "layers=3"], seed=3)
    assert (made.seed, made.max_kl, made.model, made.layers) == (3, 0.5, "a/b", "3")
    assert made.train_pairs == OrthogonalizeSettings().train_pairs


def test_all_mistakes_come_at_once_with_line_and_nearest_name(tmp_path):
    with pytest.raises(RequestError) as caught:
        _load(tmp_path, "seed: 1\nmax_kll: 0.5\nvariant: plane\n", ["leyers=3", "novalue", "train_pairs=many"])
    message = str(caught.value)
    assert "5 settings are wrong" in message
    assert "config.yaml:2: unknown key 'max_kll' (did you mean 'max_kl'?)" in message
    assert (
        "config.yaml:3: variant: got 'plane' (did you mean 'plain'?); allowed: plain, norm_preserving, projected"
        in message
    )
    assert "--set leyers=3: unknown key 'leyers' (did you mean 'layers'?)" in message
    assert "--set novalue: is not key=value" in message
    assert "train_pairs: got 'many'" in message


def test_a_file_that_is_not_yaml_names_the_line(tmp_path):
    with pytest.raises(RequestError, match=r"config\.yaml:2: is not YAML"):
        _load(tmp_path, "seed: 1\nmax_kl: [1]]\n")


def test_a_file_that_holds_a_list_is_refused(tmp_path):
    with pytest.raises(RequestError, match="holds no settings"):
        _load(tmp_path, "- seed\n")


def test_one_mistake_is_one_line_and_a_key_like_no_other_brings_all_keys(tmp_path):
    with pytest.raises(RequestError) as caught:
        _load(tmp_path, assignments=["leyers=3"])
    assert str(caught.value) == "--set leyers=3: unknown key 'leyers' (did you mean 'layers'?)"
    with pytest.raises(RequestError, match=r"unknown key 'zzzz'; keys: .*layers, .*max_kl, "):
        _load(tmp_path, assignments=["zzzz=3"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_setting_of_a_recipe_is_listed_with_its_default_and_a_help_text(recipe):
    kind = getattr(importlib.import_module(RECIPES[recipe].module), RECIPES[recipe].settings)
    listed = {key: (default, about) for key, default, about in settings_help(kind)}
    assert set(listed) == set(kind.model_fields)
    assert all(about and not about.startswith("One of") for _, about in listed.values())
    assert listed["dtype"][0] == "auto" and listed["dtype"][1].endswith("One of auto, float32, bfloat16, float16.")


def test_a_renamed_setting_answers_with_its_new_name(tmp_path):
    with pytest.raises(RequestError, match="reply_tokens is now called max_new_tokens; write max_new_tokens=8"):
        _load(tmp_path, assignments=["reply_tokens=8"])
    with pytest.raises(RequestError, match="unknown key 'stand_ins'"):
        # It is a setting of another recipe; this one never had it.
        _load(tmp_path, assignments=["stand_ins=8"])


def _kind(recipe):
    return getattr(importlib.import_module(RECIPES[recipe].module), RECIPES[recipe].settings)


NUMBERS = sorted(
    {
        (recipe, name)
        for recipe in RECIPES
        for name, field in _kind(recipe).model_fields.items()
        if isinstance(field.default, int | float) and not isinstance(field.default, bool) and name != "base_bits"
    }
)


@pytest.mark.parametrize("recipe, name", NUMBERS)
def test_numbers_are_decimal_and_bounded(recipe, name):
    kind = _kind(recipe)
    default = kind.model_fields[name].default
    needed = [f"{key}=x" for key, field in kind.model_fields.items() if field.is_required()]
    assert getattr(load_settings(kind, None, [*needed, f"{name}={default}"]), name) == default
    wrong = [
        "0-3",
        "1:30",
        "yes",
        "true",
        "nan",
        ".inf",
        "inf",
        "1e999",
        "1_0",
        "٣",
        "0x10",
        "9" * 5000,
        "{a: 1}",
        "[x]",
    ]
    if isinstance(default, int):
        wrong += ["99999999999", "1.5"]
        if name != "position":
            wrong.append("-1")
    for text in wrong:
        with pytest.raises(RequestError) as caught:
            load_settings(kind, None, [*needed, f"{name}={text}"])
        assert "\n" not in str(caught.value) and name in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "recipe, words, told",
    [
        ("elm", "preset=[a]", "got ['a']; allowed: default, paper, reference"),
        ("orthogonalize", "max_depth=inf", "max_depth: got 'inf'; write a decimal number"),
        ("orthogonalize", "max_new_tokens=0", "max_new_tokens: got 0; input should be greater than or equal to 1"),
        ("orthogonalize", "kl_prompts=0", "kl_prompts: got 0; input should be greater than or equal to 1"),
        ("orthogonalize", "questions=0-3", "questions: got '0-3'; write a decimal number"),
        ("elm", "batch_size=99999999999", "batch_size: got 99999999999; at most 2147483647 is allowed"),
        ("elm", "steps=yes", "steps: got 'yes'; write a decimal number"),
        ("caft", "pick=[-1]", "pick: got -1; input should be greater than or equal to 0"),
        ("elm", "seed=-1", "seed: got -1; input should be greater than or equal to 0"),
        ("elm", "model=a\0b", "unacceptable character #x0000"),
        ("elm", "rank=&a 1", None),
        ("elm", "rank=*a", "aliases are not read"),
        ("elm", "rank=" + "[" * 5000, "nested deeper than 100 levels"),
    ],
)
def test_a_value_that_makes_no_sense_is_one_line(recipe, words, told):
    if told is None:
        assert load_settings(_kind(recipe), None, [words]).rank == 1
        return
    with pytest.raises(RequestError) as caught:
        load_settings(_kind(recipe), None, [words])
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, told",
    [
        ("seed: 1\nseed: 2\n", "config.yaml:2: is not YAML: the key 'seed' occurs twice"),
        ("1: 2\n", "config.yaml:1: is not YAML: a key is not a text"),
        ("[a]: 2\n", "config.yaml:1: is not YAML: a key is not a text"),
        ("seed: &a 1\nrank: *a\n", "config.yaml:2: is not YAML: aliases are not read"),
        ("seed: " + "[" * 5000, "config.yaml: it is nested deeper than 100 levels"),
        ("seed: 1:30\n", "config.yaml:1: seed: got '1:30'; write a decimal number"),
        ("seed: !!python/name:os.system\n", "could not determine a constructor"),
    ],
)
def test_a_settings_file_is_read_strictly(tmp_path, text, told):
    with pytest.raises(RequestError) as caught:
        _load(tmp_path, text)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert _load(tmp_path, "seed: 010\nmax_kl: 1e-3\n").max_kl == 0.001


def test_a_pipe_as_a_settings_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(RequestError, match=r"pipe\.yaml: it is a pipe, a device or a folder"):
        load_settings(OrthogonalizeSettings, tmp_path / "pipe.yaml", [])


def test_ranges_of_layers_beyond_the_model_are_refused_at_once():
    assert layer_selection("0-3", 4) == [0, 1, 2, 3]
    for text in ("0-999999999999", "٣", "9" * 5000, "0." + "0" * 400 + "1-0.5", "4", "3-1"):
        with pytest.raises(RequestError, match="selects nothing"):
            layer_selection(text, 4)


def test_rows_to_read_have_a_limit_in_all():
    settings = ElmSettings(model=SMALL_TESTBED, steps=2_000_000, batch_size=16)
    with pytest.raises(RequestError, match="steps=2000000 times batch_size=16 are more than"):
        adapter_job.prepare("elm", settings, resume=True)
