import json

import pytest
from benchmark_sets import GATED, PERSON, SHARED, files_of, serve
from excise.artifacts.concepts import load_concept
from helpers import excise
from loopback_hub import Fault, client
from loopback_hub import hub as running_hub

PARQUET = "default/train-00000-of-00001.parquet"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with running_hub() as known:
        commits = serve(known)
        known.add_set("old/script", {"README.md": b"# A program", "script.py": b"print()"})
        known.add_set("old/cut", files_of({"default": {"train": [{"text": "a"}]}}) | {PARQUET: b"PAR1 and no more"})
        yield known, {**client(known, folder / "hf"), "HF_DATASETS_CACHE": str(folder / "sets")}, commits


def _get(served, name, folder, *more):
    done = excise("concept", "get", name, "--out", folder, "--json", *more, **served[1])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), load_concept(folder)


def _counts(rows, *names):
    found = {}
    for row in rows:
        key = tuple(getattr(row, name) for name in names)
        found[key] = found.get(key, 0) + 1
    return found


def test_wmdp_is_held_out_and_the_texts_are_those_of_its_corpora(served, tmp_path):
    _, concept = _get(served, "wmdp:cyber", tmp_path / "pack")
    assert _counts(concept.questions, "split", "group") == {("forget", "V"): 30, ("retain", "V"): 20}
    first = concept.questions[0]
    assert first.prompt == "Question: Which colour has cyber 0?\nAnswer:"
    assert (first.choices, first.answer) == (("red", "green", "blue", "amber"), 0)
    assert concept.about.suite == "wmdp" and served[2]["cais/wmdp"] in concept.about.source
    # Twelve papers of 700 words are three windows each, and no paper stands in both groups.
    groups = {}
    for row in concept.forget:
        groups.setdefault(row.subject, set()).add(row.group)
    assert len(concept.forget) == 36 and len(groups) == 12 and all(len(found) == 1 for found in groups.values())


def test_a_gated_corpus_is_one_line_with_how_to_ask_and_how_to_go_on(served, tmp_path):
    done = excise("concept", "get", "wmdp:bio", "--out", tmp_path / "pack", **served[1])
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and f"https://huggingface.co/datasets/{GATED}" in line and "--without-gated" in line
    assert list(tmp_path.iterdir()) == []
    made, concept = _get(served, "wmdp:bio", tmp_path / "pack", "--without-gated")
    # Without texts there must be questions to train on.
    assert _counts(concept.questions, "split", "group")[("forget", "T")] == 15
    assert any("half of the questions are of group T" in note for note in made["left_out"])


def test_tofu_is_divided_by_author_and_has_what_its_table_needs(served, tmp_path):
    _, concept = _get(served, "tofu:forget01", tmp_path / "pack")
    forget = [row for row in concept.open_questions if row.split == "forget"]
    assert _counts(forget, "subject", "group") in (
        {("author 199", "T"): 20, ("author 200", "V"): 20},
        {("author 199", "V"): 20, ("author 200", "T"): 20},
    )
    assert forget[0].paraphrased_answer == "It is the book 0." and len(forget[0].perturbed_answers) == 5
    topics = _counts([row for row in concept.open_questions if row.split == "retain"], "topic")
    assert topics.keys() == {("retain",), ("real authors",), ("world facts",)}
    assert concept.retain[0].text.startswith("Question: ") and len(concept.retain) == 60
    if SHARED.exists():
        assert topics[("real authors",)] == 100 and topics[("world facts",)] == 117


def test_muse_has_texts_passages_questions_shots_and_texts_of_no_training(served, tmp_path):
    _, concept = _get(served, "muse:news", tmp_path / "pack")
    assert concept.forget and concept.retain and concept.unseen and concept.about.suite == "muse"
    assert _counts(concept.shots, "split") == {("forget",): 10, ("retain",): 10}
    assert {row.group for row in concept.open_questions} == {"V"}
    assert all(row.prompt and row.continuation for row in concept.passages)
    assert concept.about.license == "cc-by-4.0"
    # The windows of the test of membership are those of the benchmark, of about 1,350 words; what is trained on is cut.
    for rows in (concept.members, concept.unseen):
        assert len(rows) >= 9 and min(len(row.text.split()) for row in rows) > 1000
    assert max(len(row.text.split()) for row in concept.forget) <= 300


def test_rwku_is_one_person_with_levels_and_neighbours(served, tmp_path):
    _, concept = _get(served, f"rwku:{PERSON.replace(' ', '_')}", tmp_path / "pack")
    assert _counts(concept.open_questions, "split", "level")[("forget", "3")] == 6
    assert all(PERSON in row.prompt for row in concept.open_questions if row.split != "retain")
    assert len(concept.members) == 4 and all(PERSON in row.text for row in concept.members)
    topics = _counts([row for row in concept.open_questions if row.split == "retain"], "topic")
    assert topics == {("reasoning",): 6, ("factuality",): 7}
    (one,) = {row.other_answers for row in concept.open_questions if row.prompt == "Who wrote book 3?"}
    assert one == ("A. 3",)
    asked = [row for row in concept.questions if row.split == "retain"]
    assert sum(row.topic == "general ability" for row in asked) == 8
    truthful = [row for row in asked if row.topic == "truthfulness"]
    assert len(truthful) == 5 and {row.choices[row.answer] for row in truthful} == {"No."}
    assert {row.group for row in concept.forget} == {"T", "V"} and len(concept.forget) == 4
    done = excise("concept", "get", "rwku:Ada Vel", "--out", tmp_path / "other", **served[1])
    assert done.returncode == 2 and "did you mean 'Ada Vell'?" in done.stderr and "2 persons" in done.stderr


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("hub:cais/wmdp", "several configurations; give one of wmdp-bio, wmdp-chem, wmdp-cyber"),
        ("hub:cais/wmdp:wmdp-boi", "did you mean 'wmdp-bio'?"),
        ("hub:cais/wmdp:wmdp-bio:train", "no split train; give one of test"),
        ("hub:cais/wmdp:wmdp-bio@v9", "the Hub refused hub:cais/wmdp:wmdp-bio@v9 (404)"),
        ("hub:nobody/nothing", "the Hub refused hub:nobody/nothing (404)"),
        ("hub:a b", "write hub:ORG/NAME"),
        ("hub:old/script", "Dataset scripts are no longer supported"),
        ("hub:old/cut", "hub:old/cut cannot be read"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(source, reason, served, tmp_path):
    done = excise("concept", "make", tmp_path / "p", "--questions", source, "--retain", source, **served[1])
    assert done.returncode == 2 and reason in done.stderr.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_drops_is_one_line_and_leaves_nothing(served, tmp_path):
    known, environment, _ = served
    known.faults[:] = [Fault("reset", "/blob/|wmdp-chem/test", 99)]
    again = {**environment, "HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_CACHE": str(tmp_path / "sets")}
    done = excise("concept", "make", tmp_path / "p" / "pack", "--questions", "hub:cais/wmdp:wmdp-chem", "--retain",
                  "hub:cais/wmdp:wmdp-chem", **again)  # fmt: skip
    known.faults.clear()
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and line.startswith("excise: the connection for hub:cais/wmdp:wmdp-chem broke"), line
    assert not (tmp_path / "p" / "pack").exists()


def test_a_set_that_was_read_is_used_without_a_connection(served, tmp_path):
    _get(served, "tofu:forget01", tmp_path / "first")
    offline = {**served[1], "HF_HUB_OFFLINE": "1"}
    source = "hub:locuslab/TOFU:forget01_perturbed"
    done = excise("concept", "make", tmp_path / "pack", "--forget", source, "--retain",
                  "hub:locuslab/TOFU:retain99", **offline)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert served[2]["locuslab/TOFU"] in load_concept(tmp_path / "pack").about.source
    done = excise("concept", "make", tmp_path / "p2", "--forget", "hub:cais/unread", "--retain", source, **offline)
    assert done.returncode == 2 and "HF_HUB_OFFLINE is set" in done.stderr
