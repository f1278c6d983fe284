"""Training after the step: it gives back what the step took from the rest, and reads of the concept what the step left."""

import json

import pytest
import torch
from excise.artifacts.checkpoints.edits import load_edit
from excise.artifacts.checkpoints.originals import originals_of
from excise.artifacts.events import Events
from excise.artifacts.models.load import load_model
from excise.editing.edits.in_place import edits_in_place
from excise.editing.errors import RequestError
from excise.recipes.common import adapter_run, kl_budget
from excise.recipes.distill.training import Distillation
from excise.recipes.repselect.recipe import RepselectSettings, _step_of_base, describe, learn, memory, prepare, run
from excise.recipes.search.request import prepare as search
from helpers import SMALL_TESTBED, excise
from safetensors.torch import load_file

CPU = torch.device("cpu")


def _job(tmp_path, resume=False, **settings):
    chosen = {"model": SMALL_TESTBED, "concept": "builtin:potions", "out": tmp_path / "run", "device": "cpu"}
    chosen |= {"dtype": "float32", "texts": 48, "questions": 6, "kl_prompts": 8, "max_new_tokens": 2}
    chosen |= {"controls": False, "kl_budget": 0.3, "mend": 12}
    return prepare(RepselectSettings(**{**chosen, **settings}), resume=resume)


def _as_predicted(model, sequences, largest=8):
    """Whether targets are what this model predicts, at the tokens that it finds most likely."""
    for one in sequences:
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([one.ids])).logits[0].double().log_softmax(-1)
        ids = one.targets.ids[:, :largest]
        if not torch.allclose(log_p.gather(1, ids), one.targets.log_p[:, :largest].double(), atol=1e-4):
            return False
    return True


def test_what_must_stay_is_learned_from_the_base_and_the_concept_from_where_the_step_ended(tmp_path, monkeypatch):
    made, learn_whole = [], adapter_run.learn

    def watched(job, loaded, make_training, *rest):
        made.append(make_training())
        return learn_whole(job, loaded, lambda *_: made[0], *rest)

    monkeypatch.setattr(adapter_run, "learn", watched)
    job = _job(tmp_path)
    out = run(job, Events()).out
    loaded = load_model(job.adapter.run.source, CPU, torch.float32)
    model, mended, record = loaded.model, load_edit(out), load_edit(out).provenance["repselect"]["mended"]
    (tmp_path / "again").mkdir()
    step = _step_of_base(_job(tmp_path / "b"), loaded, tmp_path / "again", Events())
    texts = kl_budget.budget_texts(loaded, job.adapter.run.concept, 8)
    stays, forget = (made[0].sequences[kind][:6] for kind in ("retain 0", "forget"))
    assert _as_predicted(model, stays) and not _as_predicted(model, forget)
    with edits_in_place(model, model.config.to_dict(), originals_of(job.adapter.run.checkpoint, model)) as tries:
        tries.apply(step)
        of_step = kl_budget.divergence(model, texts)
        assert _as_predicted(model, forget) and not _as_predicted(model, stays)
        tries.apply(mended)
        assert kl_budget.divergence(model, texts) < 0.8 * of_step
    assert record["before"]["kl"] == pytest.approx(of_step, rel=1e-3) and record["steps"] == 12
    assert (record["sequences"], record["sequences_to_retain"]) == (96, len(made[0].sequences["retain 0"]))
    _is_one_edit_of_the_base(out, mended)


def _is_one_edit_of_the_base(out, mended):
    """On disk, and as the card tells it."""
    stored = load_file(out / "checkpoint" / "model.safetensors")
    base = load_file(f"{SMALL_TESTBED}/model.safetensors")
    for name, delta in mended.deltas.items():
        assert torch.equal(stored[name], (base[name].float() + delta.values).to(base[name].dtype)), name
    assert {name for name in base if not torch.equal(base[name], stored[name])} == set(mended.deltas)
    card = (out / "checkpoint" / "README.md").read_text()
    assert "12 steps of training then mended what must stay" in card
    assert "| the step before it was mended |" in card
    results = json.loads((out / "checkpoint" / "excise" / "eval.json").read_text())
    assert "--set mend=12" in results["run"]["command"]
    assert excise("verify", out).returncode == 0


def test_the_base_is_itself_again_and_a_killed_run_ends_in_the_same_weights(tmp_path, monkeypatch):
    whole = run(_job(tmp_path / "a", mend=3), Events()).out
    taken = 0
    loss = Distillation.loss

    def interrupted(self, model, batch):
        nonlocal taken
        taken += 1
        if taken > 2:
            raise KeyboardInterrupt
        return loss(self, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(_job(tmp_path / "b", mend=3), Events())
    again = run(_job(tmp_path / "b", resume=True, mend=3), Events()).out
    files = [(out / "checkpoint" / "model.safetensors").read_bytes() for out in (whole, again)]
    assert files[0] == files[1] and not (again / ".work").exists()


def test_a_dry_run_plans_the_training_and_asks_for_room_for_it(tmp_path):
    with_it, without = _job(tmp_path), _job(tmp_path, mend=0)
    assert describe(with_it)["steps_of_mending"] == 12 and "steps_of_mending" not in describe(without)
    names = [stage.name for stage in memory(with_it).stages]
    assert names.index("choose the strength") < names.index("mend") and "mend" not in [
        stage.name for stage in memory(without).stages
    ]
    mend = next(stage for stage in memory(with_it).stages if stage.name == "mend")
    # Of each weight that is trained: itself in fp32, what it was, its gradient and two moments.
    assert mend.trained > 0 and mend.kept > 0


def test_a_search_refuses_it_in_one_line(tmp_path):
    job = _job(tmp_path)
    loaded = load_model(job.adapter.run.source, CPU, torch.float32)
    with pytest.raises(RequestError, match="search with mend=0") as caught:
        learn(job, loaded, Events(), tmp_path, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("setting", "told"), [("mend=4", "search with mend=0"), ("after=x", "search without after")])
def test_a_search_says_so_before_it_loads_a_model(setting, told, tmp_path):
    flags = {"model": SMALL_TESTBED, "dtype": "float32"}
    with pytest.raises(RequestError, match=told):
        search("repselect", tmp_path / "x", assignments=[setting], flags=flags, write=False)
    assert search("repselect", tmp_path / "x", assignments=["mend=0"], flags=flags, write=False).base.mend == 0
