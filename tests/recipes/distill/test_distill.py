"""Noise and distillation: the student's start is the published formula, and what it learns is what it is shown."""

import inspect
import json
import shutil

import pytest
import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.events import Events
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model, load_tokenizer
from excise.editing.edits.dense import weights_trained
from excise.editing.errors import RequestError
from excise.recipes.commands import edit
from excise.recipes.common.learned_edit import start
from excise.recipes.common.tokens import encode
from excise.recipes.data.facts import find_facts
from excise.recipes.data.unlearning_sets import without_subjects
from excise.recipes.distill.recipe import DistillSettings, _training, damage, prepare
from excise.recipes.distill.rows import beginnings, rows_to_read
from helpers import SMALL_TESTBED, excise, with_settings
from safetensors.torch import load_file, save_file

SHORT = ("steps=8", "batch_size=2", "samples=8", "questions=10", "kl_prompts=4", "max_new_tokens=4")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The small model, edited: an update of rank 4 in each matrix of its layers, and other embeddings."""
    folder = tmp_path_factory.mktemp("teacher") / "edited"
    shutil.copytree(SMALL_TESTBED, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, weight in tensors.items():
        if weight.ndim == 2:
            left, right = (torch.randn(size, 4, generator=generator) for size in weight.shape)
            tensors[name] = (weight.float() + 0.01 * left @ right.T).to(weight.dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _job(teacher, tmp_path, resume=False, **settings):
    chosen = {"model": SMALL_TESTBED, "concept": "builtin:potions", "teacher": str(teacher), "out": tmp_path / "run"}
    chosen |= {"samples": 12, "max_new_tokens": 4}
    return prepare(
        DistillSettings(**{**chosen, "device": "cpu", "dtype": "float32", "steps": 4, **settings}), resume=resume
    )


def test_the_student_begins_as_the_formula_says_one_matrix_at_a_time(teacher, tmp_path):
    job = _job(teacher, tmp_path, shrink=0.7, noise=0.2, seed=3)
    model = load_model(job.adapter.run.source, torch.device("cpu"), torch.float32).model
    edited = load_file(teacher / "model.safetensors")
    untouched = {name: weight.clone() for name, weight in model.named_parameters()}
    with weights_trained(model, job.adapter.shape.modules):
        damage(model, job)
        trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
        for name, weight in model.named_parameters():
            if name not in trained:
                assert torch.equal(weight, untouched[name])
                continue
            rows, columns = weight.shape
            noise = (weight.detach().double() - 0.3 * edited[name].double()) / (0.7 * 0.2)
            bound = (6 / (rows + columns)) ** 0.5
            assert float(noise.abs().max()) <= bound * 1.0001
            assert float(noise.var()) == pytest.approx(2 / (rows + columns), rel=0.1)
            assert abs(float(noise.mean())) < 4 * bound / (rows * columns) ** 0.5
        again = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        damage(model, job)
        assert all(torch.equal(weight, again[name]) for name, weight in model.named_parameters())
    assert len(trained) == len(job.adapter.shape.modules) and not any("embed" in name for name in trained)
    assert all(torch.equal(weight, untouched[name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize("keep", ["base", "teacher"])
def test_each_sequence_is_learned_as_the_model_that_is_named_predicts_it(teacher, tmp_path, keep):
    job = _job(teacher, tmp_path, keep=keep, batch_size=2, retain_rows=2, stored_tokens=16)
    device = torch.device("cpu")
    base = load_model(job.adapter.run.source, device, torch.float32)
    edited = load_model(find_model(str(teacher)), device, torch.float32).model
    training = _training(job, base, Events(), tmp_path)
    keeper = {"base": base.model, "teacher": edited}[keep]
    for kind, model, other in (("forget", edited, base.model), ("retain 0", keeper, None)):
        for one in training.sequences[kind][:3]:
            with torch.no_grad():
                log_p = model(input_ids=torch.tensor([one.ids])).logits[0].double().log_softmax(-1)
                others = None if other is None else other(input_ids=torch.tensor([one.ids])).logits[0].log_softmax(-1)
            assert not one.targets.log_p.requires_grad, "a target would hold the logits that it was made of"
            for place, (ids, values) in enumerate(zip(one.targets.ids, one.targets.log_p, strict=True)):
                largest = sorted(range(log_p.shape[-1]), key=lambda token: -float(log_p[place, token]))[:16]
                assert set(ids.tolist()) == set(largest)
                assert values.tolist() == pytest.approx(log_p[place, ids].tolist(), abs=1e-4)
            assert others is None or not torch.allclose(log_p.float(), others, atol=1e-2)
            assert float(one.weights.sum()) == pytest.approx(1 / 3)
    group = training.rows[0]
    assert len(group) == 3 and len({one.ids for one in group[1:]}) == 2, "each retain row of a group is another one"


def test_a_run_takes_base_and_concept_from_the_teachers_run_and_names_no_folder(tmp_path):
    erased = tmp_path / "erased"
    words = with_settings("steps=2", "questions=4", "kl_prompts=2", "max_new_tokens=2")
    done = excise("run", "grad_diff", "--model", "builtin:testbed", "--out", erased, *words)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "distilled"
    done = excise("run", "distill", "--out", out, "--json", *with_settings(f"teacher={erased}", *SHORT))
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert (results["base"]["name"], results["concept"]["ref"]) == ("builtin:testbed", "builtin:potions")
    assert results["distilled"]["teacher"]["name"] == "erased/checkpoint"
    assert results["edited"]["tensors_changed"] == results["edited"]["tensors_declared"] == 56
    assert (
        str(tmp_path)
        not in (out / "checkpoint" / "excise" / "eval.json").read_text()
        + (out / "checkpoint" / "README.md").read_text()
    )
    assert "was distilled into a copy of itself" in (out / "checkpoint" / "README.md").read_text()
    assert excise("verify", out).returncode == 0


@pytest.mark.parametrize(("changed", "said"), [
    ({"shrink": 0.0}, "shrink=0 leaves the teacher as it is"),
    ({"teacher": "nowhere/"}, "nowhere/ is no model folder"),
    ({"teacher": "builtin:testbed", "concept": "builtin:potions"}, "tensors of the base, such as"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_any_weight_is_read(teacher, tmp_path, changed, said):
    with pytest.raises(RequestError, match=said):
        _job(**{"teacher": teacher, "tmp_path": tmp_path, **changed})


def test_a_run_does_not_go_on_with_another_teacher(teacher, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(teacher, mine)
    job = _job(mine, tmp_path)
    start(job.adapter.run)
    tensors = load_file(mine / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, mine / "model.safetensors", {"format": "pt"})
    with pytest.raises(RequestError, match="the teacher"):
        start(_job(mine, tmp_path, resume=True).adapter.run)


def test_beginnings_are_the_first_words_of_what_must_stay_and_never_of_the_concept():
    concept = load_concept("builtin:potions")
    begun = beginnings(concept, 400, 0)
    stays = [*(text.text for text in concept.retain), *(q.prompt for q in concept.questions if q.split != "forget")]
    assert len(begun) == 400 and begun == beginnings(concept, 400, 0) != beginnings(concept, 400, 1)
    assert {len(one.split()) for one in begun} == {1, 2, 3, 4}
    assert all(any(text.startswith(one) for text in stays) for one in begun)


def test_models_write_what_is_learned_and_replies_about_the_concept_are_the_edited_models(teacher, tmp_path):
    job = _job(teacher, tmp_path)
    base = load_model(job.adapter.run.source, torch.device("cpu"), torch.float32)
    edited = load_model(find_model(str(teacher)), torch.device("cpu"), torch.float32).model
    arguments = (base.model, edited, base.tokenizer, job.adapter.concept, job.facts)
    rows = rows_to_read(*arguments, job.settings, lambda _: None)
    alone = rows_to_read(*arguments, job.settings.model_copy(update={"samples": 0}), lambda _: None)
    assert not alone.written and len(rows.written) == 12
    assert set(alone.forget) < set(rows.forget) and set(alone.kept) < set(rows.kept)
    for model, new in ((edited, set(rows.forget) - set(alone.forget)), (base.model, set(rows.kept) - set(alone.kept))):
        greedy = 0
        for row in sorted(new)[:40]:
            start = max(place for place, token in enumerate(row) if token in _assistant(base.tokenizer)) + 1
            text = model.generate(torch.tensor([row[:start]]), do_sample=False, max_new_tokens=len(row) - start)
            greedy += text[0].tolist() == list(row)
        assert greedy >= 8, "a reply is drawn and another one greedy, and both are this model's"


def test_replies_that_name_a_subject_to_forget_are_not_learned_again():
    """Beside the text of each row, searched for every name."""
    concept = load_concept("builtin:potions")
    tokenizer, facts = load_tokenizer(find_model(SMALL_TESTBED)), find_facts(concept)
    subjects = sorted({fact.subject for fact in facts.facts})
    texts = [text.text for text in concept.retain[:20]]
    named = [pattern.format(subject) for subject in subjects[:10] for pattern in ("{} is rare", "Ask about {}.")]
    rows = [encode(tokenizer, text, True) for text in [*texts, *named]]
    left = without_subjects(rows, facts, tokenizer)
    assert left == [row for row in rows if not any(name in tokenizer.decode(row) for name in subjects)]
    assert 0 < len(left) <= len(texts), "something to leave out, and something to keep"


def _assistant(tokenizer):
    """The last token of what a chat template puts before a reply."""
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=True)
    return {(chat if isinstance(chat, list) else chat["input_ids"])[-1]}


def test_a_run_without_a_teacher_is_told_what_to_type():
    done = excise("run", "distill")
    assert done.returncode == 2 and "teacher is missing; give --set teacher=VALUE" in done.stderr
    assert set(DistillSettings.flags) <= set(inspect.signature(edit.run).parameters)
