import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.events import Events
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.recipes.testbed.build import TestbedSettings as Settings
from excise.recipes.testbed.build import build_testbed


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
