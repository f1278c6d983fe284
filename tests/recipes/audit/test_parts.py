"""An audit in parts: the same figures as in one process, and no curve made twice."""

import json
import threading
import time
from dataclasses import replace

import pytest
from excise.artifacts.events import Events
from excise.editing.errors import RequestError
from excise.recipes.audit import locked_control, removal_control, workers
from excise.recipes.audit import recipe as audit
from excise.recipes.audit.attackers import AttackTraining
from excise.recipes.audit.attacks.table import BUDGETS, Budget
from excise.recipes.audit.audit_run import AuditRun
from excise.recipes.audit.curve_store import CurveStore
from excise.recipes.audit.more_controls import locked_control as locked_control_of
from excise.recipes.audit.more_controls import removal_control as removal_control_of
from excise.recipes.audit.parts import UNTRAINED, Part, part_called, parts_of
from excise.recipes.audit.request import GUESSING
from excise.recipes.audit.workers import parts_for, workers_of
from excise.recipes.jobs.job import JobFolder
from helpers import SMALL_REFERENCE, SMALL_TESTBED, excise

ATTACKS = ("few_shot", "rtt", "soft_prompt", "int8")
SETTINGS = {"model": SMALL_REFERENCE, "base": SMALL_TESTBED, "concept": "builtin:potions", "attacks": ATTACKS}


def test_parts_cover_every_model_and_attack_once(tmp_path):
    job = audit.prepare(audit.AuditSettings(**SETTINGS, reference=SMALL_REFERENCE, out=tmp_path / "a"))
    subjects = ("base", "edited", "reference")
    expected = {Part(subject, method) for subject in subjects for method in ("low_rank", "soft_prompt", UNTRAINED)}
    assert len(parts_of(job)) == 10 and set(parts_of(job)) == {*expected, Part("suppressed")}
    without = audit.prepare(audit.AuditSettings(**SETTINGS, out=tmp_path / "a"))
    # The floor is then made from the base, and attacked as the other models are.
    assert set(parts_of(without)) == set(parts_of(job))
    assert part_called(job, "base-low_rank") == Part("base", "low_rank")
    with pytest.raises(RequestError, match="no such part; parts: suppressed, base-low_rank"):
        part_called(job, "base-lowrank")


def test_longer_audits_of_knowledge_have_a_locked_control_and_others_where_they_are_asked_for_it(tmp_path):
    def job(**chosen):
        return audit.prepare(audit.AuditSettings(**{**SETTINGS, "attacks": ()}, out=tmp_path / "a", **chosen))

    standard = job(budget="standard")
    assert standard.locked_attacks == ("rtt",) and Part("locked") in parts_of(standard)
    assert job().locked_attacks == job(budget="long", locked=False).locked_attacks == ()
    assert job(locked=True).locked_attacks == ("rtt",)
    # Relearning would teach what was locked.
    relearning = audit.AuditSettings(**{**SETTINGS, "attacks": ("relearn",)}, out=tmp_path / "a", locked=True)
    said = locked_control_of(audit.prepare(relearning), CurveStore(tmp_path), [], "reference")
    assert said["locked"]["limit"].startswith("no attack that does not see group V fine-tunes it")
    assert locked_control_of(job(), CurveStore(tmp_path), [], "reference") == {}


def test_longer_audits_of_knowledge_have_a_removal_control_and_others_where_they_are_asked_for_it(tmp_path):
    def job(**chosen):
        return audit.prepare(audit.AuditSettings(**{**SETTINGS, "attacks": ()}, out=tmp_path / "a", **chosen))

    standard = job(budget="standard")
    assert standard.removed_attacks == ("rtt",) and Part("removed") in parts_of(standard)
    assert job().removed_attacks == job(budget="long", removed=False).removed_attacks == ()
    assert audit.describe(standard)["controls"] == ["suppressed", "locked", "removed"]
    assert audit.describe(job(removed=True))["controls"] == ["suppressed", "removed"]
    # Where the floor is guessing, there is no model that never knew.
    said = removal_control_of(job(removed=True), CurveStore(tmp_path), [], GUESSING)["removed"]
    assert said["limit"].startswith("the floor is guessing") and "--reference" in said["limit"]
    assert removal_control_of(job(), CurveStore(tmp_path), [], "reference") == {}


def test_who_comes_second_waits_until_the_first_has_made_a_curve(tmp_path):
    store, order = CurveStore(tmp_path), []

    def second():
        with store.claimed("base", "low_rank"):
            order.append("second")

    thread = threading.Thread(target=second)
    with store.claimed("base", "low_rank"), store.claimed("base", "soft_prompt"):
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_an_audit_in_parts_gives_the_figures_of_one_process(tmp_path):
    models = [SMALL_REFERENCE, "--base", SMALL_TESTBED, "--concept", "builtin:potions"]
    command = ["audit", *models, "--questions", "20", "--attacks", "few_shot,int8", "--fresh"]
    one = excise(*command, "--out", "one", cwd=tmp_path, OMP_NUM_THREADS="1")
    parts = excise(*command, "--out", "parts", "--jobs", "local:2", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert (one.returncode, parts.returncode) == (0, 0), one.stderr + parts.stderr
    assert (tmp_path / "parts" / "audit.json").read_bytes() == (tmp_path / "one" / "audit.json").read_bytes()
    assert not (tmp_path / "parts" / ".work").exists()
    stages = [
        {json.loads(line)["stage"] for line in (tmp_path / name / "events.jsonl").read_text().splitlines()}
        for name in ("one", "parts")
    ]
    assert stages[0] == stages[1]
    # Two workers, which take the parts one after the other.
    assert parts.stderr.count("finished after") == 2 and "worker-1: load " in parts.stderr


def test_a_worker_takes_what_nobody_is_at_and_what_another_left_undone(tmp_path):
    settings = audit.AuditSettings(
        **{**SETTINGS, "attacks": ("few_shot",)}, questions=20, fresh=True, out=tmp_path / "a"
    )
    job = audit.prepare(settings)
    whole = AuditRun(job, Events())
    assert [each.name for each in workers_of(job, whole, 2)] == ["worker-1", "worker-2"]
    first, second = (parts_for(job, Events(), name) for name in ("worker-1", "worker-2"))
    taken = [next(worker).part for worker in (first, second)]
    assert taken == parts_of(job)[:2]
    # The second dies in its part, so that the first goes on with it, and a new one begins with what is left.
    second.close()
    assert next(first).part == taken[1]
    assert next(parts_for(job, Events(), "worker-3")).part == taken[0]


def test_a_worker_that_ended_well_is_not_needed_again_but_another_one_may_be(tmp_path):
    settings = audit.AuditSettings(
        **{**SETTINGS, "attacks": ("few_shot",)}, questions=20, fresh=True, out=tmp_path / "a"
    )
    job = audit.prepare(settings)
    whole = AuditRun(job, Events())
    records = JobFolder(whole.work)
    records.register(workers_of(job, whole, 2))
    records.update("worker-1", state="finished")
    records.update("worker-2", state="failed")
    # A record that says finished would be skipped, and nobody would make what is left.
    assert [each.name for each in workers_of(job, whole, 2)] == ["worker-2", "worker-3"]
    assert len(workers_of(job, whole, 20)) == len(parts_of(job))


def test_no_plan_is_made_where_memory_is_ample_and_one_is_where_it_is_short_or_questions_are_long(
    tmp_path, monkeypatch
):
    job = audit.prepare(audit.AuditSettings(**{**SETTINGS, "attacks": ("rtt",)}, out=tmp_path / "a"))
    few = 100_000
    monkeypatch.setattr(workers, "free_memory", lambda _: 16 << 30)
    assert workers.plainly_fit(job, few, 2) and not workers.plainly_fit(job, few, 16)
    monkeypatch.setattr(workers, "free_memory", lambda _: 2 << 30)
    assert not workers.plainly_fit(job, few, 2)
    # A pack of questions alone has no texts, but attackers read its questions.
    monkeypatch.setattr(workers, "free_memory", lambda _: 16 << 30)
    long = [question.model_copy(update={"prompt": question.prompt * 40}) for question in job.concept.questions]
    concept = replace(job.concept, forget=(), retain=(), questions=tuple(long))
    assert not workers.plainly_fit(replace(job, concept=concept), few, 2)


def test_an_audit_takes_several_processes_only_where_they_make_it_faster(tmp_path, monkeypatch):
    def processes(**chosen):
        settings = {**SETTINGS, "attacks": ("rtt", "int8"), "questions": 20, **chosen}
        return workers.processes_for(audit.prepare(audit.AuditSettings(**settings, out=tmp_path / "a")))

    monkeypatch.setattr("excise.recipes.jobs.engines.threads_each", lambda _: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    # The small test model is audited before another process has begun.
    assert processes() == 1
    monkeypatch.setattr(workers, "FEWEST_PARAMETERS", 0)
    assert processes() == 4 and processes(attacks=("few_shot", "int8")) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert processes() == 2
    monkeypatch.setattr(workers, "SHARE", 1e-9)
    assert processes() == 1


def test_attackers_that_train_in_parts_get_as_far_as_in_one_process_and_none_trains_twice(tmp_path, monkeypatch):
    """In another order, and one is left to whoever concludes; four kinds of controls are made from the base."""
    budget = Budget(("few_shot", "rtt"), 2, 2, {"low_rank": (2e-3,)}, others=8, formats=8)
    monkeypatch.setitem(BUDGETS, "quick", budget)
    # After two steps the password-locked control is none, so nothing attacks it.
    monkeypatch.setattr(locked_control, "STEPS", 2)
    monkeypatch.setattr(locked_control, "ROUNDS", 1)
    monkeypatch.setattr(locked_control, "MOST", 8)
    # The removal control has hardly learned anything then.
    monkeypatch.setattr(removal_control, "STEPS", 2)
    monkeypatch.setattr(removal_control, "ROUNDS", 1)
    chosen = {**SETTINGS, "attacks": (), "locked": True, "removed": True}
    settings = audit.AuditSettings(**chosen, questions=20, fresh=True, out=tmp_path / "one")
    results = audit.run(audit.prepare(settings), Events())
    (gap,) = [gap for gap in results["gaps"] if "locked" in gap]
    assert gap.startswith("password-locked control: it could not be made: without the password it answers ")
    assert gap == f"password-locked control: {results['controls']['locked']['limit']}"
    (gap,) = [gap for gap in results["gaps"] if "removal" in gap]
    assert gap.startswith("removal control: it could not be made: once taught it answers ")
    trained, curves = [], AttackTraining.curves
    monkeypatch.setattr(AttackTraining, "curves", lambda *each: trained.append(tuple(each[1])) or curves(*each))
    settings = settings.model_copy(update={"out": tmp_path / "parts"})
    suppressed, locked, removed, left_out, *others = parts_of(audit.prepare(settings))
    assert (locked, removed) == (Part("locked"), Part("removed"))
    for part in (suppressed, locked, removed):
        audit.run_part(audit.prepare(settings, resume=part is not suppressed), Events(), part.name)
    for part in reversed(others):
        audit.run_part(audit.prepare(settings, resume=True), Events(), part.name)
    assert trained == 3 * [("rtt",)] and left_out.method != UNTRAINED
    audit.run(audit.prepare(settings, resume=True), Events())
    assert trained == 4 * [("rtt",)]
    assert (tmp_path / "parts" / "audit.json").read_bytes() == (tmp_path / "one" / "audit.json").read_bytes()
