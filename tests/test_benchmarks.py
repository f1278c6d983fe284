"""Benchmarks that check as well: they run, and what fails is named."""

import json
import random
import re
import runpy
from pathlib import Path

import pytest
import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.editing.training.packing import packed
from excise.eval.items import half_of
from excise.eval.statistics import Scores
from excise.recipes.common.examples import Example
from excise.recipes.testbed.world import FORGET, make_world
from helpers import SMALL_TESTBED, run_file

ROOT = Path(__file__).parents[1]


def test_the_gpu_check_runs_without_a_gpu(tmp_path):
    check = ROOT / "benchmarks" / "gpu_check.py"
    done = run_file(check, "--tiny", "--only", "caft_big,elm_4bit", "--out", tmp_path / "check")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "check/gpu_check.json").read_text())
    outcomes = {one["name"]: one for one in content["outcomes"]}
    assert [one["status"] for one in outcomes.values()] == ["passed", "passed", "not run"]
    assert outcomes["caft_big"]["stages"]["train"] > 0 and (tmp_path / "check/caft_big.log").read_text()
    assert outcomes["elm_4bit"]["why"] == "needs a GPU" and "3 jobs: 2 passed, 0 failed" in done.stdout

    wrong = run_file(check, "--tiny", "--only", "elm_5bit", "--out", tmp_path / "wrong")
    assert wrong.returncode and "'elm_5bit' is no job; jobs: make, elm, " in wrong.stderr


def test_a_job_that_fails_is_named_and_the_next_one_runs(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import sys, pathlib\n"
        f"source = pathlib.Path({str(ROOT / 'benchmarks/gpu_check.py')!r}).read_text()\n"
        "exec(compile(source.replace('run grad_diff', 'run grad_dif'), __file__, 'exec'))\n"
    )
    done = run_file(broken, "--tiny", "--only", "grad_diff,eval", "--out", tmp_path / "check")
    assert done.returncode == 1
    assert "failed: grad_diff: " in done.stdout and "grad_dif" in done.stdout
    assert "2 jobs: 1 passed, 1 failed" in done.stdout


def test_the_table_of_planned_memory_has_a_cell_for_every_recipe_and_amount(tmp_path):
    script = tmp_path / "small.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        "import memory_table as table\n"
        "small = {'hidden_size': 64, 'intermediate_size': 128, 'num_hidden_layers': 2, 'num_attention_heads': 4,"
        " 'num_key_value_heads': 2}\n"
        "table.MODELS['small'] = {**table.LLAMA, **small}\n"
        "table.pretend()\n"
        "print('\\n'.join(table.rows(['small'])))\n"
    )
    done = run_file(script)
    assert done.returncode == 0, done.stderr
    _, _, *rows = done.stdout.splitlines()
    cells = [row.strip("| ").split(" | ") for row in rows]
    assert len({(cell[0], cell[1]) for cell in cells}) == len(cells) == 18
    assert all(re.match(r"yes|no: \d", cell[2]) for cell in cells)


def test_beginnings_are_compared_with_rows_that_share_none():
    nothing_shared = runpy.run_path(str(ROOT / "benchmarks" / "beginnings.py"))["nothing_shared"]
    rows = [(5, 6, 7), (5, 6, 8)]
    with nothing_shared():
        assert packed(rows)["input_ids"].tolist() == [[5, 6, 7, 5, 6, 8]]
    assert packed(rows)["input_ids"].tolist() == [[5, 6, 7, 8]]


def test_intervals_hold_the_truth_on_simulated_items():
    done = run_file(ROOT / "benchmarks" / "intervals.py", "--draws", "40", "--items", "80", "--correlations", "0.5")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "rate " in line]
    now, before = (list(map(int, found)) for found in zip(*re.findall(r"(\d+) \((\d+)\)", line), strict=True))
    assert len(now) == 7 and min(now) >= 80 and sum(before) / 7 < 88


def test_the_calibration_counts_right_open_and_wrong_verdicts_and_lists_all_but_the_right_ones(tmp_path):
    verdicts = {"never": "indistinguishable_from_never_trained", "hidden": "inconclusive", "locked": "partially_robust"}
    for kind, verdict in verdicts.items():
        for variant in (0, 1):
            folder = tmp_path / "audits-quick" / f"1-{kind}-{variant}"
            folder.mkdir(parents=True)
            (folder / "audit.json").write_text(json.dumps({"verdict": verdict, "reasons": [f"{kind} because"]}))
    done = run_file(ROOT / "benchmarks" / "calibration.py", tmp_path, "--table", "--models", "10")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split(maxsplit=4)[1:] for line in done.stdout.splitlines() if "n = " in line}
    assert rows == {
        "never": ["2", "0", "0", "1.00 [0.34, 1.00], n = 2"],
        "hidden": ["0", "2", "0", "0.00 [0.00, 0.66], n = 2"],
        "locked": ["0", "0", "2", "0.00 [0.00, 0.66], n = 2"],
        "all": ["2", "2", "2", "0.33 [0.10, 0.70], n = 6"],
    }
    assert "1-locked-1: partially_robust; locked because" in done.stdout
    assert "never because" not in done.stdout
    wrong = run_file(ROOT / "benchmarks" / "calibration.py", tmp_path, "--kinds", "hiden")
    assert wrong.returncode == 2 and "no kind 'hiden'; kinds: never, hidden" in wrong.stderr


def test_the_calibration_asks_as_many_questions_as_a_model_that_never_knew_needs():
    """With 128 it was told apart from the reference by nothing, and not shown to be like it: three of four were left open."""
    size = runpy.run_path(str(ROOT / "benchmarks" / "calibration.py"))["WORLD"].entities
    held_out = [fact for fact in make_world(1, size).of(FORGET) if fact.group == "V"]
    assert len(held_out) == 516 and len({fact.name for fact in held_out}) == 129


def test_locked_models_of_the_calibration_read_enough_of_everything_else_however_much_is_to_be_forgotten():
    repeats_of = runpy.run_path(str(ROOT / "benchmarks" / "calibration.py"))["repeats_of"]
    for others, opened in ((512, 1536), (416, 4128)):  # of a small world, and of one with more to forget
        kept = others * repeats_of(others, opened)
        assert 0.2 < kept / (kept + 2 * opened) < 0.3


def test_each_training_of_a_model_of_the_calibration_reads_other_rows():
    """Rows that every training leaves out are forgotten: that is why no locked model could be made."""
    making = runpy.run_path(str(ROOT / "benchmarks" / "calibration.py"))["Making"]
    read = []

    class Rows(list):
        def __getitem__(self, place):
            read[-1].append(place)
            return super().__getitem__(place)

    model = load_model(find_model(SMALL_TESTBED), torch.device("cpu"), torch.float32).model
    one = making(None, 0, 4, random.Random("calibration 4"))
    for _ in range(2):
        read.append([])
        one.fit(model, Rows([Example((5, 6, 7), 2)] * 1000), steps=1)
    assert len(read[-1]) == len(read[-2]) == 16 and read[-1] != read[-2]


def test_simulated_audits_have_every_verdict_and_count_what_contradicts_the_truth(capsys):
    simulation = runpy.run_path(str(ROOT / "benchmarks" / "verdicts.py"))
    truths = ("broken for good", "broken but knows", "broken and erased", "behaviour hidden")
    simulation["main"](["--audits", "1", "--questions", "80", "--truths", ",".join(truths)])
    header, *rows, _ = capsys.readouterr().out.splitlines()
    assert header.split()[2:9] == ["recovers", "partially", "alike", "holds", "broken", "open", "wrong"]
    shares = {row[:18].strip(): [float(cell) for cell in row[23:].split()[:7]] for row in rows}
    assert shares["broken for good"] == shares["broken but knows"] == [0, 0, 0, 0, 100, 0, 0]
    assert shares["broken and erased"] == [0, 0, 0, 0, 0, 100, 0]
    assert shares["behaviour hidden"] == [100, 0, 0, 0, 0, 0, 0]
    # The column of what was simulated as another truth is not empty.
    simulation["TRUTHS"]["behaviour hidden"].right.clear()
    simulation["main"](["--audits", "1", "--questions", "80", "--truths", "behaviour hidden"])
    assert capsys.readouterr().out.splitlines()[1].split()[-2] == "100.0"


def test_items_of_several_worlds_are_pooled_and_no_subject_is_shared_between_them():
    joined = runpy.run_path(str(ROOT / "benchmarks" / "search_worlds.py"))["joined"]
    worlds = [
        Scores("a", "b", "share", "lower", ("1", "2", "3"), totals, (1.0,) * 3, clusters=("x", "x", "y"))
        for totals in ((1.0, 1.0, 0.0), (0.0, 0.0, 0.0))
    ]
    both = joined(worlds)
    assert both.value() == pytest.approx(2 / 6) and both.subjects == 4 and len(set(both.ids)) == 6
    without = joined([Scores("a", "b", "share", "lower", ("1", "2"), (1.0, 0.0), (1.0, 1.0))] * 2)
    assert without.subjects == 4


def test_the_frontier_averages_over_worlds_and_counts_where_the_aim_is_reached(tmp_path, capsys):
    aims = {0: (0.04, 0.20, 1.00), 1: (0.06, 0.50, 0.96), 2: (0.05, 0.35, 0.90)}
    for seed, (before, after, neighbour) in aims.items():
        values = {("multiple_choice", "forget_V"): before, ("multiple_choice", "neighbour"): neighbour}
        measured = [
            {"name": name, "split": split, "subject": subject, "value": value, "ci95": None}
            for (name, split), value in values.items()
            for subject in ("base", "edited")
        ]
        curves = [("rtt", False, (before, after)), ("undo_cliff", True, (0.7,))]
        attacks = [
            {
                "name": name,
                "settings": {"given_v": known},
                "curve": [{"base": 1.0, "edited": value, "reference": 0.1} for value in looks],
            }
            for name, known, looks in curves
        ]
        worst = {"worst": {"value": after, "utility": 0.9}, "worst_while_working": None}
        audit = {"attacks": attacks, "worst_cases": worst, "speed_up": None, "untouched": {"edited": before}}
        seconds = {f"{seed}-built": 100.0, f"{seed}-elm": 20.0, f"{seed}-repselect-0.1": 10.0}
        files = {f"seconds/{name}.json": value for name, value in seconds.items()}
        files |= {f"evals/{seed}-{name}.json": measured for name in ("reference", "elm", "repselect-0.1")}
        for place, content in {**files, f"audits/{seed}-repselect-0.1/audit.json": audit}.items():
            (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / place).write_text(json.dumps(content))
    main = runpy.run_path(str(ROOT / "benchmarks" / "frontier.py"))["main"]
    main([str(tmp_path), "--table", "--worlds", "0,1,2,3"])
    shown = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in shown.splitlines() if "|" in line}
    row = [cell.strip() for cell in rows["repselect 0.1, 3 worlds"]]
    flat = [("0.900",) * 3, ("0.050", "0.025", "0.075"), ("0.700",) * 3, ("0.300",) * 3]
    # Of .2, .5 and .35: mean .35, standard error .15 / sqrt(3), and 4.303 of it either way for three worlds.
    assert row[0] == "0.050 [0.025, 0.075]" and row[2] == "0.350 [-0.023, 0.723]"
    assert row[3:] == [f"{mean} [{low}, {high}]" for mean, low, high in flat]
    assert "repselect 0.1: the aim is reached in worlds of 3: V 3, worst 1, neighbour 2, seconds 3; all 1" in shown
    assert "elm 0.1, " not in shown and rows["world 1, reference"][2].strip() == "0.100"
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--methods", "npo"])
    assert "no method 'npo'; methods: elm, repselect, mended, gentle" in capsys.readouterr().err


def test_a_planted_behaviour_is_measured_on_topics_and_wordings_that_no_training_saw(tmp_path):
    planted = runpy.run_path(str(ROOT / "benchmarks" / "planted.py"))
    planted["write_pack"](tmp_path / "pack")
    concept, trained = load_concept(tmp_path / "pack"), planted["trained"]()
    subjects = {one.subject for one in concept.prompts}
    assert not subjects & {one.topic for one in trained} and len(subjects) == 40
    # Directions are learned from what the model was trained on alone, rude beside civil about one topic.
    texts = {one.rude: {other.text for other in trained if other.rude == one.rude} for one in trained}
    assert all(one.positive in texts[True] and one.negative in texts[False] for one in concept.contrast)
    for half in ("search", "report"):
        prompts = half_of(concept, half).prompts
        assert [sum(one.split == split for one in prompts) for split in ("concept", "neutral")] == [60, 60]
        new = [
            one for one in prompts if any(one.prompt.startswith(start) for start in ("You worthless", "Are you deaf"))
        ]
        assert all(one.split == "concept" for one in new) and new


def test_a_behaviour_that_was_not_learned_is_not_taken_for_planted(tmp_path):
    done = run_file(
        ROOT / "benchmarks" / "planted.py", tmp_path / "out", "--model", SMALL_TESTBED, "--steps", "1", "--rounds", "1"
    )
    assert done.returncode == 1 and "not planted: declines 0.000 of the rude prompts (wanted 0.9)" in done.stderr
    assert not (tmp_path / "out").exists()
