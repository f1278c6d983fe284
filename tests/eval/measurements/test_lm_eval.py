"""The lm-evaluation-harness on a model in memory, and our own scorer held against it."""

import json

import pytest
import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.editing.errors import RequestError
from excise.eval.inference.likelihood import log_likelihoods
from excise.eval.inference.questions import requests_of
from excise.eval.measurements.lm_eval import _drawn, _scores_of, find_tasks, scores
from helpers import excise

ITEMS = 100


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A task of our own questions, as its user would write it."""
    folder = tmp_path_factory.mktemp("task")
    questions = load_concept("builtin:potions").questions[::8][:ITEMS]
    lines = [json.dumps({"prompt": q.prompt, "choices": list(q.choices), "answer": q.answer}) for q in questions]
    (folder / "items.jsonl").write_text("\n".join(lines))
    (folder / "own.yaml").write_text(
        "task: own_potions\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test:"
        f" {folder / 'items.jsonl'}\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text:"
        " '{{prompt}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\nmetric_list:\n  -"
        " metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return folder / "own.yaml", questions


@pytest.fixture(scope="module")
def model():
    return load_model(find_model("builtin:testbed-reference"), torch.device("cpu"), torch.float32)


def test_our_scorer_agrees_with_the_harness(task, model, monkeypatch):
    """The same choice on every item, and the same log-probability of every choice."""
    import lm_eval

    file, questions = task
    kept = {}

    def keeping(**arguments):
        found = simple_evaluate(**arguments)
        kept.update(found["samples"])
        return found

    simple_evaluate = lm_eval.simple_evaluate
    monkeypatch.setattr(lm_eval, "simple_evaluate", keeping)
    (accuracy,) = scores(model.model, model.tokenizer, find_tasks([str(file)]))
    requests = [requests_of(question) for question in questions]
    ours = log_likelihoods(model.model, model.tokenizer, [request for each in requests for request in each])
    assert len(kept["own_potions"]) == ITEMS
    agreed = 0
    for sample, question, each in zip(kept["own_potions"], questions, requests, strict=True):
        theirs = [float(value[0]) for value in sample["filtered_resps"]]
        own = [ours[request].log_probability for request in each]
        assert max(abs(a - b) for a, b in zip(own, theirs, strict=True)) < 1e-3, question.id
        agreed += own.index(max(own)) == theirs.index(max(theirs))
    assert agreed == ITEMS
    # A model that never read of potions is right on some of these questions and not on all.
    assert 0.1 < accuracy.value() < 0.95


def test_a_limit_draws_items_at_random_and_not_the_first(task):
    file, _ = task
    tasks = find_tasks([str(file)])
    (places,) = _drawn(tasks, 20).values()
    assert len(set(places)) == 20 and max(places) >= 80 and _drawn(tasks, 20) == _drawn(tasks, 20)


def test_figures_come_item_by_item_with_a_base_beside_them(task):
    done = excise(
        "eval",
        "builtin:testbed-reference",
        "--base",
        "builtin:testbed",
        "--concept",
        "builtin:potions",
        "--questions",
        "16",
        "--lm-eval",
        task[0],
        "--json",
    )
    assert done.returncode == 0, done.stderr
    found = {m["subject"]: m for m in json.loads(done.stdout)["measurements"] if m["name"] == "own_potions"}
    assert found["base"]["n"] == found["edited"]["n"] == 16 and found["edited"]["split"] == "acc"
    assert found["base"]["value"] > found["edited"]["value"] and found["edited"]["difference"]["value"] < 0


def test_a_figure_that_some_items_lack_is_an_error():
    items = [{"doc_hash": str(place), "filter": "none", "metrics": ["acc"], "acc": 1.0} for place in range(3)]
    assert _scores_of("own", items)[0].totals == (1.0, 1.0, 1.0)
    with pytest.raises(RequestError, match="has acc for 2 of 3 items"):
        _scores_of("own", [*items[:2], {**items[2], "acc": None}])
    with pytest.raises(RequestError, match="has no figure for single items"):
        _scores_of("own", [{**item, "acc": (1.0, 2)} for item in items])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent.yaml", None, "is no file"),
        ("broken.yaml", "task: [", "is no YAML file"),
        ("nameless.yaml", "dataset_path: json\n", "names no task"),
        (
            "empty.yaml",
            "task: own\ndataset_path: json\ndataset_kwargs:\n  data_files: {test: gone.jsonl}\n",
            "own cannot be run: ",
        ),
    ],
)
def test_a_wrong_task_is_found_before_a_model_is_loaded(name, content, said, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(RequestError, match=said):
        find_tasks([str(tmp_path / name)])


def test_a_misspelt_task_is_named_with_its_neighbour():
    with pytest.raises(RequestError, match="no task 'helaswag'; did you mean 'hellaswag'"):
        find_tasks(["helaswag"])
