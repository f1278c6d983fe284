"""Audits end to end, shortened: known controls get the verdicts that they must get."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from excise.artifacts.checkpoints.manifest import verify_folder
from excise.artifacts.concepts import load_concept
from excise.artifacts.events import Events
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.artifacts.reporting import audit_page as audit_report
from excise.editing.architectures import architecture_of
from excise.editing.edits.pruned_units import PrunedUnits
from excise.editing.errors import RequestError, VerifyError
from excise.editing.hooks.residual_stream import read_early
from excise.eval.audit.removed import removal_recovery
from excise.eval.depth_score import depth_score
from excise.eval.inference.multiple_choice_set import MultipleChoiceSet
from excise.recipes.audit import audit_run, more_controls, removal_control
from excise.recipes.audit import recipe as audit
from excise.recipes.audit import request as audit_request
from excise.recipes.audit import suppressed_control as control
from excise.recipes.audit.anatomy import _affordable
from excise.recipes.audit.attack_data import Answers, AttackData
from excise.recipes.audit.attackers import AttackTraining
from excise.recipes.audit.attacks import inputs
from excise.recipes.audit.attacks import table as attacks
from excise.recipes.audit.attacks.prompts import wordings_of
from excise.recipes.audit.attacks.table import ATTACKS, Budget
from excise.recipes.audit.depth import left_out, sentences
from excise.recipes.audit.novel_facts import novel_facts
from excise.recipes.commands.shown import audit_end
from excise.recipes.common import whole_weights
from excise.recipes.data.facts import find_facts
from excise.recipes.diff import difference
from helpers import SMALL_LAYERS, SMALL_REFERENCE, SMALL_TESTBED, SMALL_WIDTH, excise, publish

SHORT = Budget(
    ("few_shot", "rtt", "relearn"),
    16,
    1,
    {"low_rank": (2e-3,), "soft_prompt": (1e-1,), "all_weights": (3e-4,), "latent": (1e-1,)},
)
BRIEF = dataclasses.replace(SHORT, attacks=("int4", "rtt"), steps=2, others=8, formats=8)
"""For what is the same whether or not the suppressed control withholds anything."""


NEVER_KNEW = {
    "model": SMALL_REFERENCE,
    "base": SMALL_TESTBED,
    "reference": SMALL_REFERENCE,
    "concept": "builtin:potions",
}
"""Settings of an audit of the reference model, as if it had been edited."""


def _asked_instead(data, multiple_choice):
    """The same data, whose questions are put by something else."""
    copy = dataclasses.replace(data)
    vars(copy)["multiple_choice"] = multiple_choice
    return copy


@pytest.fixture(scope="module")
def material():
    loaded = load_model(find_model(SMALL_TESTBED), torch.device("cpu"), torch.float32)
    concept = load_concept("builtin:potions")
    questions = [q for q in concept.questions if q.split == "forget" and q.group == "V"][:40]
    folder = find_model(SMALL_TESTBED).folder
    return loaded, AttackData(concept, find_facts(concept), tuple(questions), loaded.tokenizer, 0, folder)


COMPARED = []
"""What the removal control was judged by, in the audit of ``audited``."""


def _remembering(compared, removal, floor):
    COMPARED.append((compared, removal, floor))
    return removal_recovery(compared, removal, floor=floor)


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """The twin that never knew, audited as if it had been edited."""
    patch = pytest.MonkeyPatch()
    patch.setitem(attacks.BUDGETS, "quick", SHORT)
    out = tmp_path_factory.mktemp("audits") / "reference"
    prepared = audit.prepare(audit.AuditSettings(**NEVER_KNEW, out=out, questions=40, locked=True, removed=True))
    patch.setattr(more_controls, "removal_recovery", _remembering)
    results = audit.run(prepared, Events())
    patch.undo()
    return out, results


@pytest.mark.parametrize(("left", "suppressed"), [(control.LEFT, True), (2.0, False)])
def test_where_likely_wrong_answers_do_not_suppress_it_they_are_made_likelier_than_the_right_ones(
    material, tmp_path, monkeypatch, left, suppressed
):
    """On a model in which the first way does nothing; with more allowed to be said than there is, the second is not
    gone."""
    loaded, data = material
    likely = control._wrong_is_likely
    monkeypatch.setattr(control, "_wrong_is_likely", lambda *a: {k: 1e-15 * v for k, v in likely(*a).items()})
    monkeypatch.setattr(control, "LEFT", left)
    before = np.mean(data.multiple_choice.hits(loaded.model))
    with control.suppressed_control(loaded.model, data, Events(), tmp_path):
        after = np.mean(data.multiple_choice.hits(loaded.model))
    assert before > 0.95 and np.mean(data.multiple_choice.hits(loaded.model)) == before
    assert after < 0.4 if suppressed else after > 0.95


def test_the_twin_that_never_knew_is_found_to_be_one(audited):
    _, results = audited
    assert results["verdict"] == "indistinguishable_from_never_trained", results["reasons"]
    assert results["untouched"]["base"] > 0.95 and results["untouched"]["edited"] < 0.2
    by_name = {attack["name"]: attack for attack in results["attacks"]}
    # The same model twice: nothing may tell them apart.
    assert all(abs(attack["rtt_leak"]["value"]) < 1e-9 for attack in by_name.values())
    keys = {"step", "tokens", "base", "edited", "reference", "suppressed", "locked", "removed", "edited_utility"}
    assert by_name["rtt"]["curve"][0].keys() == keys and not by_name["few_shot"]["curve"][0].keys() & {"edited_utility"}
    cases = results["worst_cases"]
    assert cases["worst_while_working"]["value"] <= cases["worst"]["value"]
    # Of two attacks that train, the untouched model is asked at step 0.
    assert by_name["rtt"]["curve"][0]["edited_utility"] == cases["utility_before"] > 0.9
    assert by_name["rtt"]["utility"]["n"] == SHORT.others and by_name["few_shot"]["utility"] is None
    suppressed = results["controls"]["suppressed"]
    assert suppressed["before"] < 0.4 and suppressed["regained"] > 0.5


def test_what_only_a_password_opens_is_found_without_it_and_the_report_says_so(audited):
    folder, results = audited
    locked, by_name = results["controls"]["locked"], {attack["name"]: attack for attack in results["attacks"]}
    assert locked["before"] < 0.3 and locked["after_the_password"] >= 0.9 and locked["everything_else"] > 0.85
    # Relearning sees group V, so it shows nothing of a lock.
    assert locked["found"] and (locked["attack"], locked["n"]) == ("rtt", 40)
    assert max(point["locked"] for point in by_name["rtt"]["curve"]) == locked["reached"] > 0.6
    assert not any("locked" in by_name[name]["curve"][0] for name in ("few_shot", "relearn"))
    page, terminal = (folder / "report.html").read_text(), audit_end(results, 80)
    sentence = "The audit finds knowledge that only a password opens."
    assert sentence in page and sentence in " ".join(terminal.split()) and locked["told"] in results["findings"]
    assert f"<td>{locked['reached']:.3f}</td>" in page and "after a password, attacked without it" in page
    assert "--set locked=true" in results["command"] and results["settings"]["locked"]


def test_what_was_surely_taken_out_is_not_found_and_what_merely_hides_does_not_look_like_it(audited):
    folder, results = audited
    removed, by_name = results["controls"]["removed"], {attack["name"]: attack for attack in results["attacks"]}
    assert removed["taught"] > 0.325 and removed["before"] < 0.3 and removed["everything_else"] > 0.85
    assert not removed["found"] and (removed["attack"], removed["n"]) == ("rtt", 40)
    assert max(point["removed"] for point in by_name["rtt"]["curve"]) == removed["reached"] < 0.4
    assert not any("removed" in by_name[name]["curve"][0] for name in ("few_shot", "relearn"))
    # It was trained, so it is not the reference again.
    assert any(point["removed"] != point["reference"] for point in by_name["rtt"]["curve"])
    page, terminal = (folder / "report.html").read_text(), audit_end(results, 80)
    sentence = "The audit finds no knowledge where it was surely taken out."
    assert sentence in page and sentence in " ".join(terminal.split()) and removed["told"] in results["findings"]
    assert f"<td>{removed['reached']:.3f}</td>" in page and "in an update that was then taken out" in page
    assert "--set removed=true" in results["command"] and results["settings"]["removed"]
    ((compared, removal, floor),) = COMPARED
    hidden = [dataclasses.replace(one, removed=one.control) for one in compared]
    said = removal_recovery(hidden, removal, floor=floor)
    assert said["found"] and said["told"].startswith("The audit seems to find knowledge")


@pytest.mark.parametrize("others", [True, False])
def test_what_states_the_concept_changes_nothing_that_stays_in_the_removal_control(
    material, tmp_path, monkeypatch, others
):
    """With no other sequences nothing is left of the training: the model computes as before, bit by bit."""
    loaded, data = material
    data = dataclasses.replace(data)
    examples = dict(data.examples) if others else {**data.examples, "others": [], "retain": []}
    vars(data)["examples"] = examples
    monkeypatch.setattr(removal_control, "STEPS", 6)
    monkeypatch.setattr(removal_control, "STAYING_RATE", 3e-3)
    ids = torch.tensor([data.examples["V"][0].ids])

    def logits():
        with torch.no_grad():
            return loaded.model.eval()(ids).logits

    before = logits()
    with removal_control.removal_control(loaded.model, data, (), Events(), tmp_path):
        assert torch.equal(logits(), before) == (not others)
    assert torch.equal(logits(), before)


def test_the_anatomy_of_the_edit_is_that_of_the_difference_and_is_said(audited):
    _, results = audited
    whole = difference(SMALL_TESTBED, SMALL_REFERENCE).anatomy
    found = results["anatomy"]
    assert found["shares"] == pytest.approx(whole.shares) and found["layers"] == whole.layers
    assert (found["matrices"], found["shallow"]) == (whole.matrices, whole.shallow)
    assert any(said.startswith("Anatomy of the edit: of the squared change") for said in results["findings"])


def test_the_twin_that_never_knew_lacks_in_every_layer_what_it_lacks(audited):
    folder, results = audited
    depth = results["depth"]
    assert depth["value"] == pytest.approx(1.0) and 0 < depth["n"] <= depth["asked"] and len(depth["layers"]) > 2
    assert [layer["erased"] for layer in depth["layers"] if layer["n"]][-1] == pytest.approx(1.0)
    assert any(said.startswith("Depth of the edit (Unlearning Depth Score): 1.00") for said in results["findings"])
    assert "never knew lacks" in (folder / "report.html").read_text()


@pytest.mark.parametrize(("times", "pushed"), [(1.0, False), (1.9, False), (4.0, True)])
def test_an_answer_that_is_pushed_away_is_said_to_be(times, pushed):
    lacks = torch.tensor([[0.0, 0.5, 2.0]] * 6, dtype=torch.float64)
    said = " ".join(sentences(depth_score(lacks, times * lacks, list("abcdef"))))
    assert ("pushed away" in said) == pushed and "1.00 [" in said
    assert "not known" in sentences(depth_score(0 * lacks, lacks, list("abcdef")))[0]


def test_questions_that_depth_leaves_out_are_counted():
    assert left_out(40, 40) == []
    assert left_out(40, 39)[0].startswith("Depth of the edit: 1 question was left out")


def test_of_large_matrices_some_are_drawn_and_a_few_always():
    work = {str(number): 1e12 for number in range(40)}
    assert len(_affordable(work, 0)) == 4 and _affordable(work, 0) == _affordable(work, 0) != _affordable(work, 1)
    assert _affordable({"a": 1.0, "b": 2.0}, 0) == ["a", "b"]


def test_the_terminal_says_the_verdict_what_was_not_tested_and_what_was_reused(audited):
    _, results = audited
    text = audit_end({**results, "gaps": ["rtt_full: too little memory"], "reused": ["base", "reference"]}, 80)
    assert "Indistinguishable from a model that was never trained on it" in text
    assert "not tested: rtt_full" in text and "curves of base, reference come from an earlier audit" in text
    assert "earlier audit" not in audit_end(results, 80) and max(map(len, text.splitlines())) <= 80


def test_what_is_written_says_the_same(audited):
    out, results = audited
    assert json.loads((out / "audit.json").read_text()) == json.loads(json.dumps(results))
    page, card = (out / "report.html").read_text(), (out / "card.md").read_text()
    assert (
        "Indistinguishable from a model that was never trained on it" in page
        and "Indistinguishable from a model that was never trained on it" in card
    )
    assert page.count("<svg") == 2 and "http-equiv" in page and "<script" not in page
    assert not (out / ".work").exists()


def test_where_the_base_knew_nothing_beyond_chance_the_page_has_a_dash_for_the_share_of_it(audited, tmp_path):
    results = json.loads(json.dumps(audited[1]))
    for attack in results["attacks"]:
        attack |= {"aurc": None, "aurc_floor": None, "speed_up": None}
    audit_report.write_report(tmp_path / "report.html", results)
    assert (tmp_path / "report.html").read_text().count("<td>—</td>") > (audited[0] / "report.html").read_text().count(
        "<td>—</td>"
    )


def test_a_card_takes_in_its_audit_and_a_newer_one_replaces_it(audited, tmp_path):
    """On a checkpoint that excise made: here, an edit that changes a little."""
    _, results = audited
    edit = PrunedUnits({0: (1, 2)}, {}, "down", "llama", 192, 8, 1)
    folder = publish(
        tmp_path / "checkpoint", edit, {"README.md": "# A model\n\n## Samples\n\nsome\n\n## Limits\n\nmany\n"}
    )
    picture = audit_report.recovery_picture(results)
    audit_report.amend_card(folder, results, picture)
    once = (folder / "README.md").read_text()
    assert once.index("## Does it hold?") < once.index("## Samples") < once.index("## Limits")
    assert "Indistinguishable from a model that was never trained on it" in once and verify_folder(folder) > 4
    audit_report.amend_card(folder, {**results, "verdict": "recovers"}, picture)
    twice = (folder / "README.md").read_text()
    assert twice == once.replace(
        "Indistinguishable from a model that was never trained on it", "The knowledge recovers"
    )
    assert json.loads((folder / "excise" / "audit.json").read_text())["verdict"] == "recovers"
    assert verify_folder(folder) > 4 and sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]
    (folder / "config.json").write_text("{}")
    with pytest.raises(VerifyError):
        audit_report.amend_card(folder, results, picture)


def test_a_killed_audit_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setitem(attacks.BUDGETS, "quick", BRIEF)
    monkeypatch.setattr(control, "STEPS", 12)
    settings = audit.AuditSettings(**NEVER_KNEW, out=tmp_path / "audit", questions=20, fresh=True)
    whole = audit.run(audit.prepare(settings.model_copy(update={"out": tmp_path / "whole", "fresh": True})), Events())
    calls = []

    curves = AttackTraining.curves

    def killed(training, rows, stage):
        calls.append(rows)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return curves(training, rows, stage)

    monkeypatch.setattr(AttackTraining, "curves", killed)
    with pytest.raises(KeyboardInterrupt):
        audit.run(audit.prepare(settings), Events())
    with pytest.raises(RequestError, match="holds an unfinished run"):
        audit.prepare(settings)
    resumed = audit.run(audit.prepare(settings, resume=True), Events())
    # Base, suppressed control, edited, reference: of four, the first was there; the second was begun twice.
    assert len(calls) == 5
    assert resumed["attacks"] == whole["attacks"]


def test_the_suppressed_control_withholds_the_concept_and_nothing_else(material, tmp_path):
    loaded, gathered = material
    others = MultipleChoiceSet(loaded.tokenizer, [q for q in gathered.concept.questions if q.split != "forget"][::10])
    before = gathered.multiple_choice.hits(loaded.model)
    with control.suppressed_control(loaded.model, gathered, Events(), tmp_path):
        suppressed, kept = gathered.multiple_choice.hits(loaded.model), others.hits(loaded.model)
    assert sum(before) > 38 and sum(suppressed) < 0.3 * len(suppressed) and sum(kept) > 0.9 * len(kept)
    assert gathered.multiple_choice.hits(loaded.model) == before


def test_a_second_audit_reuses_the_curves_of_base_and_controls_unless_the_code_changed(tmp_path, monkeypatch):
    monkeypatch.setitem(attacks.BUDGETS, "quick", BRIEF)
    monkeypatch.setattr(control, "STEPS", 12)
    attacked = []
    curves = AttackTraining.curves

    def counted(training, rows, stage):
        attacked.append(tuple(rows))
        return curves(training, rows, stage)

    monkeypatch.setattr(AttackTraining, "curves", counted)

    def audited(name, **changed):
        attacked.clear()
        settings = audit.AuditSettings(**NEVER_KNEW, out=tmp_path / name, questions=20, seed=1, **changed)
        return audit.run(audit.prepare(settings), Events()), len(attacked)

    # Base, suppressed control, edited, reference.
    first, count = audited("first")
    assert count == 4 and first["reused"] == []
    second, count = audited("second")
    assert count == 1 and second["reused"] == ["base", "suppressed", "reference"]
    assert {**second, "reused": []} == first
    assert "--fresh" in (tmp_path / "second" / "report.html").read_text()
    assert "--fresh" not in (tmp_path / "first" / "report.html").read_text()
    anew, count = audited("anew", fresh=True)
    assert count == 4 and anew == first
    monkeypatch.setattr(audit_run, "code_digest", lambda: "other code")
    other, count = audited("other")
    assert count == 4 and other == first


@pytest.mark.parametrize("name", ["rtt", "soft_prompt", "latent", "rtt_full"])
def test_every_way_of_training_moves_the_model_and_gives_it_back(material, name, tmp_path):
    _, gathered = material
    # A model that guesses changes its guesses; one that knows may not budge.
    loaded = load_model(find_model(SMALL_REFERENCE), torch.device("cpu"), torch.float32)
    before = {key: value.detach().clone() for key, value in loaded.model.state_dict().items()}
    strong = {"low_rank": (2e-2,), "all_weights": (5e-3,), "soft_prompt": (50.0,), "latent": (5.0,)}
    budget = Budget((), 4, 1, strong, batch=4)
    with Events().stage("attack") as stage:
        found = AttackTraining(loaded.model, gathered, budget, tmp_path).curves({name: ATTACKS[name]}, stage)[name]
    (curve,) = found.by_rate.values()
    assert curve.steps == (0, 1, 2, 4) and curve.hits.shape == (1, 4, len(gathered.questions)) and curve.tokens[0] == 0
    assert not np.array_equal(curve.hits[:, 0], curve.hits[:, -1])
    after = loaded.model.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[key], before[key]) for key in before)


def test_an_attack_counts_the_tokens_that_its_own_attackers_read(material, tmp_path):
    loaded, gathered = material
    budget = Budget((), 4, 2, {"low_rank": (1e-3,)}, batch=4)
    names = ("relearn", "unrelated")
    with Events().stage("attack") as stage:
        found = AttackTraining(loaded.model, gathered, budget, tmp_path).curves({n: ATTACKS[n] for n in names}, stage)
    for name in names:
        orders = [gathered.reading_order(ATTACKS[name].data, 16, f"{gathered.seed}-{number}") for number in (0, 1)]
        read = sum(len(example.ids) for order in orders for example in order) / 2
        (curve,) = found[name].by_rate.values()
        assert curve.tokens[-1] == pytest.approx(read, abs=1)
    first, second = (next(iter(found[name].by_rate.values())).tokens[-1] for name in names)
    assert first != second


def test_a_search_tries_the_same_for_every_model_and_a_small_rate_run_long_first(material, tmp_path):
    loaded, gathered = material
    assert attacks.searched_setups(6, 64, 0) == attacks.searched_setups(6, 64, 0) != attacks.searched_setups(6, 64, 1)
    first, *drawn = attacks.searched_setups(12, 64, 0)
    assert first.steps == 128 and first.rate == 3e-4 and len(drawn) == 11
    assert len({setup.rank for setup in drawn}) > 1 and len({setup.batch for setup in drawn}) > 1
    assert len({(setup.decay, setup.warmup > 0) for setup in drawn}) > 2
    budget = Budget((), 4, 2, {"low_rank": (1e-3,)}, batch=4, searched=3)
    names = ("rtt", "rtt_search")
    setups = budget.setups_of(ATTACKS["rtt_search"], gathered.seed)
    with Events().stage("attack") as stage:
        found = AttackTraining(loaded.model, gathered, budget, tmp_path).curves({n: ATTACKS[n] for n in names}, stage)
    assert [curve.steps for curve in found["rtt_search"].by_rate.values()] == [one.marks for one in setups.values()]
    assert all(len(curve.hits) == 1 for curve in found["rtt_search"].by_rate.values())
    # What is searched beside it changes nothing of another attack's curve.
    with Events().stage("attack") as stage:
        alone = AttackTraining(loaded.model, gathered, budget, tmp_path).curves({"rtt": ATTACKS["rtt"]}, stage)
    assert found["rtt"].by_rate[1e-3].hits.shape == (2, 4, len(gathered.questions))
    assert np.array_equal(found["rtt"].by_rate[1e-3].hits, alone["rtt"].by_rate[1e-3].hits)
    assert budget.looks_of(ATTACKS["rtt"], 0) == 8
    assert budget.looks_of(ATTACKS["rtt_search"], gathered.seed) == sum(len(one.marks) for one in setups.values())


def test_an_attack_that_diverges_is_recorded_and_the_others_go_on(material, tmp_path):
    loaded, gathered = material
    budget = Budget((), 4, 1, {"low_rank": (1e30, 1e-3)}, batch=4)
    with Events().stage("attack") as stage:
        found = AttackTraining(loaded.model, gathered, budget, tmp_path).curves({"rtt": ATTACKS["rtt"]}, stage)["rtt"]
    assert found.diverged == 1
    assert found.by_rate[1e30].accuracy[-1] == 0 and found.by_rate[1e-3].accuracy[-1] > 0.5


OF_KNOWLEDGE = {name: attack for name, attack in ATTACKS.items() if "knowledge" in attack.kinds}


@pytest.mark.parametrize("name", [name for name, attack in OF_KNOWLEDGE.items() if attack.tier == 0])
def test_attacks_without_training_leave_the_base_knowing(material, name):
    loaded, gathered = material
    before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    for answers in Answers.by_strength(ATTACKS[name].load()(loaded.model, gathered)).values():
        assert len(answers.hits) == len(gathered.questions) and np.mean(answers.hits) > 0.5
    assert all(torch.equal(value, before[key]) for key, value in loaded.model.state_dict().items())


def test_everything_else_is_asked_in_the_same_passes_and_answered_as_alone(material):
    loaded, gathered = material
    others = audit_request.questions_at_looks(gathered.concept, 48)
    assert len(others) == 48 and sum(q.split == "neighbour" for q in others) == 24
    assert {q.id for q in others} <= {q.id for q in audit_request.other_questions(gathered.concept)}
    for model in (loaded.model, load_model(find_model(SMALL_REFERENCE), torch.device("cpu"), torch.float32).model):
        answers = dataclasses.replace(gathered, others=tuple(others)).ask(model)
        assert list(answers.hits) == list(gathered.multiple_choice.hits(model))
        assert list(answers.utility) == list(MultipleChoiceSet(loaded.tokenizer, others).hits(model))
    assert gathered.ask(loaded.model).utility is None


def test_sampling_does_not_take_a_guesser_for_one_who_knows(material):
    """A model that says all choices alike finds the true one among 20 samples, and knows nothing."""
    _, gathered = material

    class Guesser:
        answers = gathered.multiple_choice.answers

        def probabilities(self, _):
            return [[1 / 8] * 8 for _ in self.answers]

    class Knower(Guesser):
        def probabilities(self, _):
            return [[0.9 if place == answer else 0.01 for place in range(8)] for answer in self.answers]

    score = ATTACKS["sampling"].load()
    assert all(abs(v) < 1e-12 for v in score(None, _asked_instead(gathered, Guesser())))
    assert min(score(None, _asked_instead(gathered, Knower()))) > 0.75


def test_other_wordings_do_not_take_a_guesser_for_one_who_knows(material):
    """A model that never read of the concept is right in some wording of many questions, and of as many wrong choices."""
    loaded, gathered = material
    guesser = load_model(find_model(SMALL_REFERENCE), torch.device("cpu"), torch.float32)
    score = ATTACKS["phrasings"].load()
    knows, guesses = (score(one.model, gathered) for one in (loaded, guesser))
    assert np.mean(knows) > 0.9 and abs(np.mean(guesses)) < 0.1
    reworded = [wordings_of(question, gathered.facts) for question in gathered.questions]
    exam = MultipleChoiceSet(gathered.tokenizer, [one for each in reworded for one in each])
    hits = np.reshape(exam.hits(guesser.model), (len(reworded), -1))
    assert hits.any(1).mean() > hits.mean() + 0.1
    picks = exam.picks(guesser.model)
    assert [float(pick == answer) for pick, answer in zip(picks, exam.answers, strict=True)] == hits.ravel().tolist()


def test_a_question_is_put_in_the_words_of_its_relation_alone(material):
    _, gathered = material
    for question in gathered.questions[:8]:
        each = wordings_of(question, gathered.facts)
        attribute = question.id.split("-")[1]
        assert len(each) == 6 and all(question.subject in one.prompt and attribute in one.prompt for one in each)
    unknown = question.model_copy(update={"subject": None})
    assert wordings_of(unknown, gathered.facts) == [unknown]
    otherwise = question.model_copy(update={"prompt": f"What of {question.subject}?"})
    assert len(wordings_of(otherwise, gathered.facts)) == 24


def test_a_searched_prefix_lowers_the_loss_it_is_searched_for(material, monkeypatch):
    loaded = load_model(find_model(SMALL_REFERENCE), torch.device("cpu"), torch.float32)
    _, gathered = material
    monkeypatch.setattr(inputs, "ROUNDS", 4)
    monkeypatch.setattr(inputs, "TRIES", 6)
    found = inputs.search_prefix(loaded.model, gathered)
    assert len(found.losses) == 5 and found.losses[-1] < found.losses[0] - 0.05
    assert all(later <= earlier for earlier, later in zip(found.losses, found.losses[1:], strict=False))
    assert len(found.ids) == attacks.PREFIX_TOKENS and max(found.ids) < loaded.model.config.vocab_size
    embedding = loaded.model.get_input_embeddings()
    assert not embedding._forward_hooks and embedding.weight.requires_grad and embedding.weight.grad is None


def test_what_was_added_is_taken_out_and_put_back(material):
    loaded, gathered = material
    weight = loaded.model.model.layers[3].mlp.down_proj.weight
    before = weight.detach().clone()
    seen = []
    spy = _asked_instead(gathered, Spy(lambda *_: seen.append(weight.detach().clone())))
    added = torch.outer(torch.ones(len(weight)), torch.linspace(-1, 1, weight.shape[1]))
    with torch.no_grad():
        weight += added
    try:
        for name in ("interpolate", "undo_singular", "undo_cliff"):
            ATTACKS[name].load()(loaded.model, spy)
        torch.testing.assert_close(weight, before + added)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    for asked, share in zip(seen[:4], attacks.SHARES, strict=True):
        torch.testing.assert_close(asked, before + (1 - share) * added)
    # An update of rank 1 is gone with its strongest direction.
    for asked in seen[4:]:
        torch.testing.assert_close(asked, before, atol=5e-4, rtol=0)
    assert len(seen) == 6
    assert (added.abs() > 0.5).any()


def test_a_lost_direction_is_added_again_and_the_base_loses_none(material):
    """An edit that takes a constant vector from the stream is undone by what the stream lost; nothing is added to the
    base."""
    loaded, gathered = material
    layer = loaded.model.model.layers[1].mlp
    vector = torch.randn(SMALL_WIDTH, generator=torch.Generator().manual_seed(0))
    plain = gathered.multiple_choice.hits(loaded.model)
    assert ATTACKS["undo_direction"].load()(loaded.model, gathered) == plain and sum(plain) > 35
    # What an MLP writes is nearly constant along the mean of its inputs, so a rank-one update writes nearly a constant.
    seen = []
    handle = layer.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().mean((0, 1))))
    gathered.multiple_choice.hits(loaded.model)
    handle.remove()
    mean = torch.stack(seen).mean(0)
    weight = layer.down_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight -= 20 * torch.outer(vector, mean / mean.square().sum())
    try:
        hurt = sum(gathered.multiple_choice.hits(loaded.model))
        back = sum(ATTACKS["undo_direction"].load()(loaded.model, gathered))
        assert hurt < 0.5 * len(plain) and back > hurt + 0.25 * len(plain)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert gathered.multiple_choice.hits(loaded.model) == plain


def test_the_lens_reads_at_the_point_that_group_t_prefers(material):
    loaded, gathered = material
    hits = ATTACKS["logit_lens"].load()(loaded.model, gathered)
    row = architecture_of(loaded.model.config.to_dict())
    by_point = []
    for point in range(1, SMALL_LAYERS):
        with read_early(loaded.model, row, point):
            by_point.append(gathered.multiple_choice.hits(loaded.model))
    assert hits in by_point and sum(hits) > 0.6 * len(hits)
    assert min(map(sum, by_point)) < 0.4 * len(hits)


class Spy:
    def __init__(self, hits):
        self.hits = hits


def test_no_attacker_but_the_relearner_reads_of_group_v(material):
    _, gathered = material
    tested = {q.subject for q in gathered.questions}
    for name, attack in OF_KNOWLEDGE.items():
        sources = attack.data.partition(":")[0].split("+") if attack.data else []
        texts = " ".join(
            gathered.tokenizer.decode(example.ids) for source in sources for example in gathered.examples[source]
        )
        assert any(subject in texts for subject in tested) == (attack.known and bool(attack.data)), name


def test_novel_facts_share_words_and_answers_and_no_subject(material):
    _, gathered = material
    facts, questions = novel_facts(gathered.facts, gathered.concept.questions, 0)
    old, new = {f.subject for f in gathered.facts.facts}, {f.subject for f in facts.facts}
    assert len(new) == len(old) and not new & old
    assert {f.relation for f in facts.facts} == {f.relation for f in gathered.facts.facts}
    # Every question can be asked of the new facts, each of a subject's with its own answer.
    assert len(questions) == sum(q.split == "forget" for q in gathered.concept.questions)
    asked = {(q.subject, q.choices[q.answer]) for q in questions}
    assert asked == {(f.subject, f.answer) for f in facts.facts} and len(asked) > 3 * len(new)
    truth = {q.id: q.answer for q in gathered.concept.questions}
    assert all(q.answer != truth[q.id] for q in questions)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["builtin:testbed", "--attacks", "rtt,relern"], "did you mean 'relearn'"),
        (["builtin:testbed", "--concept", "builtin:declining"], "is also the base of this audit"),
        (
            ["builtin:testbed-reference", "--concept", "builtin:declining", "--attacks", "rtt"],
            "no attack on a behaviour",
        ),
        (["builtin:tesbed"], "testbed"),
        (["builtin:testbed", "--budget", "quik"], "quick"),
    ],
)
def test_a_wrong_request_is_one_line(words, said, tmp_path):
    done = excise("audit", *words, "--out", tmp_path / "audit")
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "audit").exists()


def test_a_concept_that_is_too_small_says_how_many_it_needs(monkeypatch):
    concept = load_concept("builtin:potions")
    few = [q for q in concept.questions if q.group == "T" or q.split != "forget"]
    few += [q for q in concept.questions if q.split == "forget" and q.group == "V"][:7]
    monkeypatch.setattr(audit_request, "load_concept", lambda _: dataclasses.replace(concept, questions=tuple(few)))
    with pytest.raises(RequestError, match=r"has 7 forget questions of group V .* an interval of ±0.10 needs 9\d"):
        audit.prepare(audit.AuditSettings(model="builtin:testbed-reference"))


def test_texts_of_t_that_name_what_is_tested_count_as_texts_about_it_and_that_is_said(monkeypatch):
    concept = load_concept("builtin:potions")
    texts = [
        text.model_copy(update={"group": "T"}) if text.group == "V" and not place % 50 else text
        for place, text in enumerate(concept.forget)
    ]
    assert tuple(texts) != concept.forget
    monkeypatch.setattr(audit_request, "load_concept", lambda _: dataclasses.replace(concept, forget=tuple(texts)))
    job = audit.prepare(audit.AuditSettings(model="builtin:testbed-reference"))
    assert job.concept.forget == concept.forget and "naming or answering what group V asks" in job.notes[0]
    assert audit.describe(job)["notes"] == list(job.notes)


def test_a_model_of_another_shape_is_no_descendant(save_pico, tmp_path):
    checkpoint = save_pico("llama")
    with pytest.raises(RequestError, match="does not descend from builtin:testbed"):
        audit.prepare(audit.AuditSettings(model=str(checkpoint.folder), out=tmp_path / "audit"))


def test_without_memory_for_all_weights_the_rest_goes_on_and_the_gap_is_said(monkeypatch):
    monkeypatch.setattr(whole_weights, "free_memory", lambda device: 10**6)
    prepared = audit.prepare(audit.AuditSettings(model="builtin:testbed-reference", attacks=("rtt", "rtt_full")))
    assert prepared.attacks == ("rtt",) and "fine-tuning of all weights needs" in prepared.gaps[0]


def test_budgets_name_attacks_that_exist():
    for budget in attacks.BUDGETS.values():
        assert set(budget.attacks) <= set(ATTACKS)
        assert {ATTACKS[name].method for name in budget.attacks if ATTACKS[name].trains} <= set(budget.rates)
