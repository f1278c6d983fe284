"""Searches end to end: what they keep, how they go on after a kill, and that what chooses is not what is reported."""

import json
import os
import signal
import subprocess
import time

import pytest
import torch
from excise.artifacts.checkpoints.edits import load_edit
from excise.artifacts.concepts import load_concept
from excise.artifacts.events import Events
from excise.artifacts.models.load import load_model
from excise.editing.edits.base import edit_model
from excise.eval.items import clusters_of, for_training, half_of, held_out_texts, text_of
from excise.eval.model_under_test import ModelUnderTest
from excise.recipes.common.search_space import Dimension
from excise.recipes.search.bench import Bench
from excise.recipes.search.figures import Figure, Objective, figure
from excise.recipes.search.request import prepare, read_record, recorded
from excise.recipes.search.run import run
from excise.recipes.search.study import Study, file_in, without_password
from helpers import SMALL_TESTBED, excise, random_edit, started, with_settings

SIZES = with_settings("kl_prompts=4", "max_new_tokens=6", "train_pairs=16", "validation_pairs=4", "questions=20")
SEARCH = ["search", "orthogonalize", "--model", SMALL_TESTBED, "--dtype", "float32", *SIZES, "--prompts", "6"]


def _study(folder):
    request = recorded(folder)
    return request, Study(request.storage, request.space, request.rules.objectives, request.rules.guards, 0, 50)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "found"
    done = excise(*SEARCH, "--trials", "7", "--out", folder, "--json")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), done.stderr


def test_both_halves_share_no_subject_and_training_sees_neither_half_only():
    for name in ("potions", "declining"):
        concept = load_concept(f"builtin:{name}")
        search, report = half_of(concept, "search"), half_of(concept, "report")
        for rows in ("questions", "prompts", "forget"):
            ours, theirs = ({row.id for row in getattr(half, rows)} for half in (search, report))
            assert ours.isdisjoint(theirs) and len(ours | theirs) == len(getattr(concept, rows))
            assert abs(len(ours) - len(theirs)) <= 0.1 * len(ours | theirs)
        subjects = [
            {one for rows in (half.questions, half.prompts) for one in clusters_of(concept, rows)}
            for half in (search, report)
        ]
        assert subjects[0].isdisjoint(subjects[1])
        texts = [{row.id for row in held_out_texts(half)} for half in (search, report)]
        assert texts[0].isdisjoint(texts[1]) and texts[0] | texts[1] == {row.id for row in held_out_texts(concept)}
        trained = {text_of(row) for row in for_training(concept).retain}
        assert not trained & {text_of(row) for half in (search, report) for row in held_out_texts(half)}


def test_a_search_prints_its_front_and_one_line_a_trial(searched):
    folder, results, stderr = searched
    assert sum(results["trials"].values()) == 7 and results["front"]
    assert len([line for line in stderr.splitlines() if line.startswith("trial ")]) == 7
    page = (folder / "search.html").read_text()
    assert "<svg" in page and "https://" not in page and f"<td>{results['front'][0]['trial']}</td>" in page


def test_a_trial_costs_its_edit_and_no_checkpoint(searched):
    folder, _, _ = searched
    sizes = [path.stat().st_size for path in (folder / "trials").rglob("*") if path.is_file()]
    assert sum(sizes) < 1_000_000 and not list(folder.rglob("model.safetensors"))
    assert not list((folder / "trials").glob(".*"))


def test_the_figures_of_a_trial_are_those_of_its_edit_applied_anew(searched):
    """An independent check: another model, the edit read from disk, its KL token by token in float64."""
    folder, results, _ = searched
    one = results["front"][-1]
    request = recorded(folder)
    edit = load_edit(folder / "trials" / f"{one['trial']:04}")
    base, edited = (load_model(request.job.source, torch.device("cpu"), torch.float32) for _ in range(2))
    edit_model(edit, edited.model, edited.model.config.to_dict())
    bench = Bench(request.job, base, request.prompts)
    total, count = 0.0, 0
    with torch.no_grad():
        for reply in bench.baselines["all"].replies:
            for end in range(len(reply.ids)):
                ids = torch.tensor([[*reply.prompt_ids, *reply.ids[:end]]])
                p, q = (one.model(input_ids=ids).logits[0, -1].double().log_softmax(-1) for one in (base, edited))
                total, count = total + float((p.exp() * (p - q)).sum()), count + 1
    # The stored type is bfloat16: a trial rounds to it as an export does, the model in float32 here does not.
    assert one["values"]["kl.replies:min"] == pytest.approx(total / count, rel=0.1, abs=1e-5)


def test_the_base_is_the_base_again_after_every_trial(tmp_path):
    flags = {"model": SMALL_TESTBED, "dtype": "float32"}
    words = [f"{word}" for word in SIZES if word != "--set"]
    request = prepare("orthogonalize", tmp_path / "s", assignments=words, flags=flags, trials=3, prompts=4)
    from excise.recipes.search import run as loop

    seen = []
    before = loop.Bench

    class Watched(before):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            seen.append(
                (self.loaded.model, {key: value.clone() for key, value in self.loaded.model.state_dict().items()})
            )

    loop.Bench = Watched
    try:
        run(request, Events())
    finally:
        loop.Bench = before
    model, weights = seen[0]
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def _bench(folder):
    """Of the built-in model, which declines; the small one of most tests does not."""
    words, flags = ["kl_prompts=4", "max_new_tokens=20"], {"dtype": "float32"}
    request = prepare("orthogonalize", folder / "s", assignments=words, flags=flags, prompts=8, write=False)
    return Bench(request.job, load_model(request.job.source, torch.device("cpu"), torch.float32), request.prompts)


def _along(bench, strength, **options):
    config = bench.loaded.model.config.to_dict()
    return random_edit(config, strength=strength, embedding_strength=0.0, **options)


def test_replies_that_stay_are_not_generated_and_are_those_that_would_be(tmp_path):
    """Beside an edit that changes some replies, one that changes none, and replies made anew by another instance."""
    bench, counts = _bench(tmp_path), {}
    behaviour, likelihood = figure("behaviour"), figure("behaviour.likelihood")
    bench.measure_base([likelihood, behaviour])
    for strength, rank in ((0.01, 1), (0.5, 4), (1.0, 96)):
        with bench.edited(_along(bench, strength, rank=rank)) as sittings:
            anew = ModelUnderTest(
                bench.loaded.model, bench.loaded.tokenizer, bench.concepts["all"], bench.settings["all"]
            )
            for size in ("few", "all"):
                for one in (likelihood, behaviour):
                    assert sittings[size].value(one) <= 1
            assert sittings["all"].subject.replies("concept") == anew.replies("concept")
            made = sum(one.generated for one in sittings.values())
            counts[rank] = made, sum(len(reply.ids) for reply in anew.replies("concept"))
    assert counts[1][0] < counts[1][1] / 4 and counts[96][0] == counts[96][1] > 0


def test_the_base_is_compared_with_as_it_is_without_an_edit(tmp_path):
    """Measured while a trial's edit is in its weights, the base would be that trial, and the change 0."""
    wanted = [figure("declines.elsewhere"), figure("behaviour.change")]
    bench = _bench(tmp_path)
    bench.measure_base(wanted)
    with bench.edited(_along(bench, 1.0, rank=96)) as sittings:
        for size in ("few", "all"):
            for one in wanted:
                change = bench.value(one, sittings[size], size)
                assert change == sittings[size].value(one) - bench.base[size].value(one)
        assert bench.base["all"].value(wanted[1]) == 1.0
        assert bench.value(wanted[1], sittings["all"], "all") < -0.25
        with pytest.raises(AssertionError, match="measure_base was not called with degenerate"):
            bench.value(figure("degenerate"), sittings["all"], "all")


def test_the_first_trials_are_those_that_the_recipe_names(searched):
    folder, _, _ = searched
    request, study = _study(folder)
    first = [one.params for one in sorted(study.done(), key=lambda one: one.number)]
    named = [dict(one) for one in request.first]
    assert len(named) == 4 and first[: len(named)] == named[: len(first)]
    assert all(one not in named for one in first[len(named) :])
    # Where somebody names what to vary, the recipe's own values are none of it.
    words = [word for word in SIZES if word != "--set"] + ["strength={search: [0.1, 1.0]}"]
    flags = {"model": SMALL_TESTBED, "dtype": "float32"}
    assert prepare("orthogonalize", folder / "x", assignments=words, flags=flags, write=False).first == ()


def test_what_was_killed_goes_on_with_the_same_command_and_ends_as_if_it_was_not(searched, tmp_path):
    whole, _, _ = searched
    folder = tmp_path / "killed"
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    process = started(*SEARCH, "--trials", "7", "--out", folder, **pipes)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("trial 1,"):
            break
    # In the middle of a trial, with no chance to tidy up.
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, study = _study(folder)
    kept = {one.number: one.values for one in study.done()}
    again = excise(*SEARCH, "--trials", "7", "--out", folder)
    assert again.returncode == 0, again.stderr
    _, study = _study(folder)
    done = study.done()
    assert len(done) == 7 and {one.number: one.values for one in done if one.number in kept} == kept
    assert study.running() == 0 and len(again.stderr.split("trial ")) - 1 == 7 - len(kept)
    # Trials that were killed are done again with the same values, and all others are those of a search that was not.
    _, reference = _study(whole)
    assert [(one.params, one.values) for one in done] == [(one.params, one.values) for one in reference.done()]


def test_a_picked_trial_is_an_ordinary_run_on_the_other_half_that_says_so(searched, tmp_path):
    folder, results, _ = searched
    number = results["front"][0]["trial"]
    done = excise("pick", folder, number, "--out", tmp_path / "picked", "--json")
    assert done.returncode == 0, done.stderr
    picked = json.loads(done.stdout)
    assert picked["run"]["settings"]["items"] == "report" and picked["run"]["settings"]["chosen_from"] == 7
    assert picked["run"]["settings"]["strength"] == results["front"][0]["settings"]["strength"]
    card = (tmp_path / "picked/checkpoint/README.md").read_text()
    assert "chosen from 7 trials of `excise search`" in card and "a search never asked" in card
    edit, tried = load_edit(tmp_path / "picked"), load_edit(folder / "trials" / f"{number:04}")
    assert torch.equal(edit.basis, tried.basis) and edit.layer_strengths == tried.layer_strengths
    report = half_of(load_concept("builtin:declining"), "report")
    shown = {one["prompt"] for one in picked["samples"]}
    assert shown and shown <= {one.prompt for one in report.prompts}
    missing = excise("pick", folder, 999)
    assert missing.returncode == 2 and "trial 999" in missing.stderr and "of the front" in missing.stderr


def test_a_worker_joins_and_another_command_is_refused(searched):
    folder, _, _ = searched
    joined = excise("search", "--worker", folder, "--trials", "8")
    assert joined.returncode == 0, joined.stderr
    assert joined.stderr.count("trial ") == 1
    other = excise(*SEARCH, "--objective", "kl.replies:min", "--trials", "8", "--out", folder)
    assert other.returncode == 2 and "begun with other objectives" in other.stderr
    record = read_record(folder)
    assert record["storage"] == file_in(folder)


def test_workers_of_one_machine_share_a_study_and_do_no_trial_twice(tmp_path):
    folder = tmp_path / "shared"
    done = excise(*SEARCH, "--trials", "4", "--jobs", "local:2", "--out", folder, "--json")
    assert done.returncode == 0, done.stderr
    assert sum(json.loads(done.stdout)["trials"].values()) == 4
    _, study = _study(folder)
    assert len({tuple(sorted(one.params.items())) for one in study.done()}) == 4
    # What two workers asked for at the same moment is no trial of the one who came second, and names nobody.
    workers = {tuple(trial.user_attrs["worker"]) for trial in study.study.get_trials() if trial.params}
    assert 1 <= len(workers) <= 2 and all(os.getpid() != process for _, process in workers)


def test_a_damaged_record_and_a_wrong_folder_are_one_line(searched, tmp_path):
    folder, _, _ = searched
    (tmp_path / "search.json").write_text((folder / "search.json").read_text().replace('"prompts": 6', '"prompts": 7'))
    damaged = excise("search", "--worker", tmp_path)
    assert damaged.returncode == 2 and "was changed" in damaged.stderr and len(damaged.stderr.splitlines()) == 1
    none = excise("pick", tmp_path / "nowhere", 1)
    assert none.returncode == 2 and "holds no search" in none.stderr


def test_no_password_of_a_database_is_written_or_shown():
    assert without_password("postgresql://ada:secret@host/name") == "postgresql://ada@host/name"
    assert without_password("sqlite:////tmp/a.db") == "sqlite:////tmp/a.db"


def test_settings_that_are_searched_and_objectives_are_checked_before_a_weight_is_read(tmp_path):
    for words, said in (
        (["--set", "rank={search: [4]}"], "allowed: {search: [LOW, HIGH]}"),
        (["--set", "rankk={search: [4, 8]}"], "did you mean 'rank'"),
        (["--objective", "forge:min"], "did you mean 'forget'"),
        (["--guard", "rest"], "FIGURE>=NUMBER"),
        (["--set", "rank={search: [0, 8]}"], "rank"),
        (["--trials", "0"], "at least 1"),
        (["--storage", "nonsense"], "cannot be opened"),
    ):
        done = excise("search", "grad_diff", "--model", SMALL_TESTBED, *words, "--out", tmp_path / "s")
        assert done.returncode == 2 and said in done.stderr, (words, done.stderr)
        assert len(done.stderr.splitlines()) == 1
    assert excise("search", "grad_dif").stderr.count("did you mean 'grad_diff'") == 1


def test_workers_that_ask_at_once_draw_what_one_worker_would(tmp_path):
    space = {"strength": Dimension(0.0, 1.0), "layers": Dimension(1, 24)}

    perplexity = Figure("retain perplexity", "perplexity", "retain")

    def study(name):
        return Study(f"sqlite:///{tmp_path / name}.db", space, [Objective(perplexity, "min")], [], 0, 40)

    alone, both = study("alone"), [study("shared"), study("shared")]
    drawn = []
    for _ in range(6):
        trial, values = alone.ask(40)
        alone.tell(trial, "complete", [0.5], {})
        drawn.append(values)
    # Each asks before the other has told anything.
    at_once = [worker.ask(40)[1] for _ in range(3) for worker in both]
    assert at_once == drawn and len({tuple(values.values()) for values in drawn}) == 6
    # Both saw that one more is wanted, and one of them gets it; what the other asked for is no trial.
    assert [worker.ask(7) is None for worker in both] == [False, True]
    assert both[0].running() == 7 and both[0].done() == []
