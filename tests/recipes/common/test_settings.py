import importlib

import pytest
from excise.editing.errors import RequestError
from excise.recipes import RECIPES
from excise.recipes.common.settings import load_settings, settings_help
from excise.recipes.orthogonalize.recipe import OrthogonalizeSettings


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
    assert listed["dtype"][0] == "auto" and listed["dtype"][1].endswith("One of auto, float32, bfloat16.")


def test_a_renamed_setting_answers_with_its_new_name(tmp_path):
    with pytest.raises(RequestError, match="reply_tokens is now called max_new_tokens; write max_new_tokens=8"):
        _load(tmp_path, assignments=["reply_tokens=8"])
    with pytest.raises(RequestError, match="unknown key 'stand_ins'"):
        # It is a setting of another recipe; this one never had it.
        _load(tmp_path, assignments=["stand_ins=8"])
