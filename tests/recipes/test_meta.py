"""Measurements are told to be faithful where they tell models that know from models that never did, and else not."""

import json
import shutil

import pytest
import torch
from excise.artifacts.models.source import BUILTIN
from excise.editing.edits.fake_quantization import linear_weights
from excise.editing.errors import EditError, RequestError
from excise.eval.measurements import BY_LAYER, MEASUREMENTS, label_of
from excise.recipes import meta
from excise.recipes.commands.failures import Interrupted
from excise.recipes.commands.measure import meta as meta_command
from excise.recipes.commands.shown import meta_evaluation
from helpers import SMALL_REFERENCE, SMALL_TESTBED, excise
from safetensors.torch import load_file, save_file

BUILTIN_POTIONS = BUILTIN / "concepts" / "potions"
PACK = ("--concept", "builtin:potions", "--questions", "12", "--steps", "4")


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """Two models that know and two that never did: each a small model and the same with a little noise."""
    folder = tmp_path_factory.mktemp("pools")
    return [
        [source, str(_noisy(source, folder / name))] for source, name in ((SMALL_TESTBED, "k"), (SMALL_REFERENCE, "n"))
    ]


def _noisy(source, out):
    shutil.copytree(source, out)
    generator = torch.Generator().manual_seed(0)
    path = out / "model.safetensors"
    tensors = load_file(path)
    noisy = {name: t + 0.01 * t.std() * torch.randn(t.shape, generator=generator).to(t) for name, t in tensors.items()}
    save_file(noisy, path, {"format": "pt"})
    return out


def _models(knowing, unknowing, *edited):
    pairs = [("--knows", one) for one in knowing] + [("--never", one) for one in unknowing]
    return [word for pair in (*pairs, *(("--edited", one) for one in edited)) for word in pair]


@pytest.fixture(scope="module")
def found(pools, tmp_path_factory):
    out = tmp_path_factory.mktemp("meta") / "found"
    done = excise("meta", *_models(*pools, pools[1][1]), *PACK, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), out, done


def _row(content, name, split):
    return next(one for one in content["measurements"] if (one["name"], one["split"]) == (name, split))


def test_what_asks_for_the_knowledge_tells_the_pools_apart(found):
    content, out, _ = found
    row = _row(content, "multiple_choice", "forget_V")
    assert row["auc"] == 1.0 and row["higher"] == "knows" and row["knowing"] > 0.8 > 0.3 > row["unknowing"]
    # Two models of each kind cannot prove it.
    assert row["ci95"][0] < 0.5 and row["ci95"][1] == 1.0
    rest = _row(content, "multiple_choice", "retain")
    assert rest["higher"] == "either" and rest["overall"] is None
    assert json.loads((out / "meta.json").read_text()) == content
    assert "--steps 4" in content["command"] and str(out) not in content["command"]


def test_a_model_that_never_knew_moves_as_the_one_it_is_compared_with(found):
    """The edited model is itself one that never knew, and gains from the same lesson about what the other does."""
    content, _, _ = found
    row = _row(content, "cloze", "forget_V")
    assert 0 <= row["four_bits"] <= 1 and row["relearning"] > 0.5


def test_pools_the_wrong_way_round_are_told_to_be_so_and_nothing_is_measured_twice(found, pools):
    content, _, _ = found
    knowing, unknowing = pools
    again = excise("meta", *_models(unknowing, knowing), *PACK, "--json")
    assert again.returncode == 0, again.stderr
    assert "measure" not in again.stderr and "load" not in again.stderr
    turned = json.loads(again.stdout)
    for one in turned["measurements"]:
        if one["higher"] != "either":
            before = _row(content, one["name"], one["split"])
            assert one["auc"] == pytest.approx(1 - before["auc"])
    shown = excise("meta", *_models(knowing, unknowing), *PACK)
    assert "AUC" in shown.stdout and "never" in shown.stdout and "retain" not in shown.stdout


def test_a_model_is_what_it_was_after_it_was_rounded_and_taught():
    job = meta.prepare(
        [SMALL_TESTBED] * 2, [SMALL_REFERENCE] * 2, [SMALL_TESTBED], "builtin:potions", questions=4, steps=2
    )
    loaded = meta.load_model(job.edited[0], job.device, job.dtype)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    ids = torch.tensor([[5, 9, 7]])
    logits = loaded.model(ids).logits
    for state in (meta.ROUNDED, meta.RELEARNED):
        with meta._in_state(job, loaded, state, meta.Events()):
            assert not torch.equal(loaded.model(ids).logits, logits)
        after = loaded.model.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_rounding_that_changes_nothing_is_an_error():
    job = meta.prepare([SMALL_TESTBED] * 2, [SMALL_REFERENCE] * 2, [SMALL_TESTBED], "builtin:potions", questions=4)
    loaded = meta.load_model(job.edited[0], job.device, job.dtype)
    with torch.no_grad():
        for weight in linear_weights(loaded.model).values():
            weight.zero_()
    with pytest.raises(EditError, match="changed no weight"), meta._in_state(job, loaded, meta.ROUNDED, meta.Events()):
        pass


def test_a_cache_that_cannot_be_written_changes_nothing(pools, tmp_path):
    (tmp_path / "excise").mkdir()
    (tmp_path / "excise" / "meta").write_text("a file, where the folder of the cache would be")
    words = ("meta", *_models(*pools), "--concept", "builtin:potions", "--questions", "4", "--json")
    done = excise(*words, XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert _row(json.loads(done.stdout), "multiple_choice", "forget_V")["auc"] == 1.0


def test_the_command_names_models_as_they_were_typed(pools, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, source in zip("abcd", (*pools[0], *pools[1]), strict=True):
        (tmp_path / name).symlink_to(source)
    job = meta.prepare(["a", "b"], ["c", "d"], [], "builtin:potions", questions=3, steps=2, dtype="float32")
    expected = "--knows a --knows b --never c --never d --concept builtin:potions --questions 3 --steps 2 --seed 0"
    assert job.command == f"excise meta {expected} --dtype float32"


def test_a_pack_without_texts_or_questions_of_group_t_cannot_be_relearned_from(tmp_path):
    pack = tmp_path / "pack"
    shutil.copytree(BUILTIN_POTIONS, pack)
    for name in ("questions.jsonl", "forget.jsonl"):
        rows = [json.loads(line) for line in (pack / name).read_text().splitlines()]
        kept = [row for row in rows if row.get("group") != "T" or row.get("split", "forget") != "forget"]
        (pack / name).write_text("".join(json.dumps(row) + "\n" for row in kept))
    pools = [SMALL_TESTBED] * 2, [SMALL_REFERENCE] * 2
    assert meta.prepare(*pools, [], str(pack)).edited == ()
    with pytest.raises(RequestError, match="nothing of group T to relearn from"):
        meta.prepare(*pools, [SMALL_TESTBED], str(pack))


def test_every_measurement_that_there_is_can_be_shown():
    names = [*MEASUREMENTS, BY_LAYER]
    rows = tuple(meta.Judged(name, "forget_V", "share", 0.9, 0.1, "knows", 1.0, (0.4, 1.0), 0.5, 0.5) for name in names)
    text = meta_evaluation(
        meta.MetaEvaluation("pack", ("a", "b"), ("c", "d"), ("e",), 4, 0, rows, (), "excise meta"), None
    )
    assert all(label_of(name) in text for name in MEASUREMENTS) and f"{label_of(BY_LAYER)} " not in text
    assert "Not shown: 1 row " in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--knows", "builtin:testbed", "--never", "builtin:testbed-reference", *PACK[:2]], "--knows names 1 model"),
        ([*_models(["builtin:testbed"] * 2, ["builtin:testbed"] * 2), *PACK[:2]], "stands in --knows and in --never"),
        (
            [*_models(["builtin:testbed"] * 2, ["builtin:testbed-reference"] * 2), "--concept", "builtin:declining"],
            "give a knowledge pack",
        ),
        ([*_models(["builtin:testbad"] * 2, ["builtin:testbed-reference"] * 2), *PACK[:2]], "did you mean"),
    ],
)
def test_a_wrong_request_is_one_line(words, said):
    done = excise("meta", *words)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_an_interrupt_says_that_the_same_command_goes_on(pools, monkeypatch):
    knowing, unknowing = pools

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(meta, "run", stopped)
    with pytest.raises(Interrupted, match="the same command goes on"):
        meta_command(knowing, unknowing, "builtin:potions")
