"""What trials are compared with is the base, and not the first edit that was under way when somebody asked."""

from excise.artifacts.events import Events
from excise.artifacts.models.load import load_model
from excise.recipes.search import run as loop
from excise.recipes.search.bench import Bench
from excise.recipes.search.request import prepare
from helpers import SMALL_TESTBED


def test_early_ends_compare_with_the_unedited_base(tmp_path, monkeypatch):
    seen = []

    class Watched(Bench):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            seen.append(self)

    monkeypatch.setattr(loop, "Bench", Watched)
    words = ["kl_prompts=4", "max_new_tokens=4", "train_pairs=16", "validation_pairs=4", "questions=20"]
    flags = {"model": SMALL_TESTBED, "dtype": "float32"}
    request = prepare("orthogonalize", tmp_path / "s", assignments=words, flags=flags, trials=6, prompts=4)
    loop.run(request, Events())
    loaded = load_model(request.job.source, request.job.device, seen[0].loaded.model.dtype)
    fresh = Bench(request.job, loaded, request.prompts)
    figures = [one.figure for one in request.rules.stand_ins]
    fresh.measure_base(figures)
    for size in ("few", "all"):
        asked = [one for one in figures if one.measurement != "kl_from_base"]
        values = [seen[0].base[size].value(one) for one in asked]
        assert values == [fresh.base[size].value(one) for one in asked] and len(values) > 0
