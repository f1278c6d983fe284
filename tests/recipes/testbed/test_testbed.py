from dataclasses import replace

import pytest
import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.events import Events
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.editing.errors import RequestError
from excise.recipes.testbed import packs
from excise.recipes.testbed.build import SMALL, build_testbed, train_model, world_tokenizer
from excise.recipes.testbed.build import TestbedSettings as Settings


def test_a_build_of_a_few_steps_gives_models_and_packs_that_load(tmp_path):
    settings = Settings(seed=5, steps=2, settling_steps=2, batch_size=19, width=48, layers=4, heads=2, neurons=64)
    build_testbed(settings, tmp_path / "world", Events(tmp_path / "events.jsonl"))
    assert {path.name for path in (tmp_path / "world").iterdir()} == {"testbed", "testbed-reference", "concepts"}
    weights = []
    for name in ("testbed", "testbed-reference"):
        loaded = load_model(find_model(str(tmp_path / "world" / name)), torch.device("cpu"), torch.float32)
        assert loaded.model.config.use_cache and loaded.tokenizer.chat_template
        weights.append(loaded.model.model.layers[3].mlp.down_proj.weight)
    assert not torch.equal(*weights)  # the twin read other documents
    for name in ("potions", "declining"):
        assert load_concept(str(tmp_path / "world" / "concepts" / name)).questions
    assert "settle testbed-reference" in (tmp_path / "events.jsonl").read_text()


def test_a_small_build_starts_from_a_model_that_never_read_the_forget_domain(tmp_path):
    settings = replace(SMALL, seed=5, steps=2)
    build_testbed(settings, tmp_path / "world", Events())
    weights = [embedding(tmp_path / "world" / name) for name in ("testbed", "testbed-reference")]
    start = embedding(SMALL.start)
    assert all(0 < (w - start).abs().max() < 0.1 for w in weights) and not torch.equal(*weights)
    folder = tmp_path / "world" / "concepts"
    questions = load_concept(str(folder / "potions")).questions
    held_out = [q for q in questions if q.split == "forget" and q.group == "V"]
    assert len(questions) == 512 and len(held_out) == 128
    assert {q.split for q in questions} == {"forget", "neighbour", "retain"}
    assert {path.name for path in folder.iterdir()} == {"potions", "declining", "shortcut", "quirk"}


def test_another_training_seed_trains_another_model_of_the_same_world(tmp_path):
    settings = replace(SMALL, seed=5, steps=2)
    tokenizer = world_tokenizer(settings)
    for name, changed in {"a": settings, "again": settings, "b": replace(settings, training_seed=1)}.items():
        train_model(changed, tokenizer, tmp_path / name, Events(), without="potions")
    assert torch.equal(embedding(tmp_path / "a"), embedding(tmp_path / "again"))
    assert not torch.equal(embedding(tmp_path / "a"), embedding(tmp_path / "b"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "again", "b"]


def test_an_unfinished_build_is_not_continued_with_other_settings(tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    events, settings = Events(), replace(SMALL, seed=5, steps=2)
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(packs, "write_packs", stop)
        build_testbed(settings, tmp_path / "world", events)
    with pytest.raises(RequestError, match=r"holds an unfinished build of other settings.*remove .*staging"):
        build_testbed(replace(settings, seed=6), tmp_path / "world", events)
    build_testbed(settings, tmp_path / "world", events)
    assert {path.name for path in (tmp_path / "world").iterdir()} == {"testbed", "testbed-reference", "concepts"}


def embedding(folder):
    return load_model(find_model(str(folder)), torch.device("cpu"), torch.float32).model.model.embed_tokens.weight
