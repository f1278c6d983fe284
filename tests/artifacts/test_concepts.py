import json
import os
import shutil
from pathlib import Path

import pytest
from excise.artifacts import events
from excise.artifacts.concepts import BUILTIN, builtin_concepts, load_concept
from excise.editing.errors import ConceptError, RequestError

LANDMARKS = Path(__file__).parents[3] / "shared" / "concepts" / "landmarks"


@pytest.fixture
def pack(tmp_path):
    shutil.copytree(BUILTIN / "potions", tmp_path / "potions")
    return tmp_path / "potions"


def _replace_line(path, number, **changes):
    lines = path.read_text().splitlines()
    lines[number - 1] = json.dumps({**json.loads(lines[number - 1]), **changes})
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("name", builtin_concepts())
def test_built_in_concepts_are_valid(name):
    concept = load_concept(f"builtin:{name}")
    task = concept.about.kind == "task"
    assert concept.questions and concept.contrast and concept.retain and bool(concept.train) == task
    assert set(concept.sha256) >= {"concept.yaml", "train.jsonl" if task else "forget.jsonl"}


@pytest.mark.skipif(not LANDMARKS.exists(), reason="the landmarks pack is not beside the repository")
def test_the_landmarks_pack_is_valid():
    concept = load_concept(str(LANDMARKS))
    assert (concept.ref, len(concept.questions), concept.about.kind) == ("landmarks", 884, "knowledge")


def test_facts_of_one_subject_share_a_group():
    groups = {}
    for question in load_concept("builtin:potions").questions:
        groups.setdefault(question.subject, set()).add(question.group)
    assert all(len(found) == 1 for found in groups.values())


def test_every_bad_line_is_listed_at_once_with_its_number(pack):
    _replace_line(pack / "questions.jsonl", 3, answer=99)
    _replace_line(pack / "questions.jsonl", 5, split="forgot")
    _replace_line(pack / "forget.jsonl", 2, text="   ")
    first = json.loads((pack / "retain.jsonl").read_text().splitlines()[0])
    _replace_line(pack / "retain.jsonl", 4, id=first["id"])
    with (pack / "contrast.jsonl").open("a") as file:
        file.write("not json\n")
    with pytest.raises(ConceptError) as caught:
        load_concept(str(pack))
    message = str(caught.value)
    assert "5 bad lines" in message
    assert "questions.jsonl:3: answer 99 is out of range" in message
    assert "questions.jsonl:5: split" in message
    assert "forget.jsonl:2: text: is blank" in message
    assert f"retain.jsonl:4: id {first['id']!r} is used in line 1 already" in message
    assert "contrast.jsonl:257: not a JSON object" in message


def test_a_subject_in_both_groups_is_an_error(pack):
    rows = [json.loads(line) for line in (pack / "questions.jsonl").read_text().splitlines()]
    number = next(n for n, row in enumerate(rows, 1) if row["split"] == "forget" and row["group"] == "T")
    _replace_line(pack / "questions.jsonl", number, group="V")
    with pytest.raises(ConceptError, match=r"in V here and in T|in T here and in V"):
        load_concept(str(pack))


def test_an_unknown_key_is_an_error(pack):
    _replace_line(pack / "prompts.jsonl", 1, anwser="red")
    with pytest.raises(ConceptError, match=r"prompts.jsonl:1: anwser: is not a key"):
        load_concept(str(pack))


def test_missing_and_empty_files_are_named(pack):
    (pack / "retain.jsonl").write_text("")
    (pack / "concept.yaml").write_text("name: [unclosed")
    with pytest.raises(ConceptError) as caught:
        load_concept(str(pack))
    for part in ("retain.jsonl: holds no line", "concept.yaml:1: is not YAML"):
        assert part in str(caught.value)


def test_a_pack_says_what_to_edit_in_one_of_its_files(pack):
    (pack / "forget.jsonl").unlink()
    assert len(load_concept(str(pack)).forget) == 80, "questions of group T with their answers"
    (pack / "questions.jsonl").unlink()
    with pytest.raises(ConceptError, match=r"forget\.jsonl or questions\.jsonl or open_questions\.jsonl: is missing"):
        load_concept(str(pack))


def test_a_recipe_names_the_file_it_needs(pack):
    (pack / "contrast.jsonl").unlink()
    (pack / "retain.jsonl").unlink()
    rows = [json.loads(line) for line in (pack / "questions.jsonl").read_text().splitlines()]
    (pack / "questions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows if r["split"] == "forget"))
    with pytest.raises(ConceptError, match=r"orthogonalize needs contrast\.jsonl"):
        load_concept(str(pack)).require("orthogonalize", "contrast")


def test_an_unknown_concept_suggests_the_nearest():
    with pytest.raises(RequestError, match="did you mean 'declining'"):
        load_concept("builtin:declinin")


@pytest.mark.parametrize(
    "line, told",
    [
        ('{"id": "a", "id": "b"}', "the key 'id' occurs twice"),
        ('{"id": NaN}', "NaN is not a finite number"),
        ("[" * 5000, "nested deeper than 100 levels"),
        ('{"id": "\\ud800"}', "half of a character pair"),
        ("[]", "not an object of keys"),
    ],
)
def test_a_line_that_readers_would_disagree_about_is_listed(pack, line, told):
    with (pack / "contrast.jsonl").open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(ConceptError, match=rf"1 bad line; .*\n.*contrast\.jsonl:258: .*{told}"):
        load_concept(str(pack))


@pytest.mark.parametrize("name", ["questions.jsonl", "concept.yaml", "contrast.jsonl", "notes.jsonl"])
def test_a_pipe_in_a_pack_is_refused_and_not_waited_for(pack, name):
    (pack / name).unlink(missing_ok=True)
    os.mkfifo(pack / name)
    with pytest.raises(RequestError, match=rf"{name}.*a pipe, a device or a folder"):
        load_concept(str(pack))


def test_a_wrong_value_of_a_row_is_told_in_plain_words(pack):
    _replace_line(pack / "forget.jsonl", 2, text=5)
    _replace_line(pack / "questions.jsonl", 3, answer="B")
    with pytest.raises(ConceptError) as caught:
        load_concept(str(pack))
    assert "forget.jsonl:2: text: is not a text" in str(caught.value)
    assert "questions.jsonl:3: answer: is not a whole number" in str(caught.value)


class _Seen:
    def __init__(self):
        self.calls = []

    def start(self, stage, total):
        self.calls.append(("start", stage, total))

    def advance(self, steps, metrics):
        self.calls.append(("advance", steps))

    def stop(self):
        self.calls.append(("stop",))


def _pack(folder, texts):
    folder.mkdir()
    about = "name: slow\ndescription: things\nkeywords: [x]\nlicense: CC0-1.0\nsource: here\n"
    (folder / "concept.yaml").write_text(about)
    rows = [{"id": f"t{n}", "text": f"Ünd {n} text", "group": "TV"[n % 2]} for n in range(texts)]
    (folder / "forget.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return folder


def test_reading_a_pack_is_announced_once_it_takes_long_and_counts_its_bytes(tmp_path, monkeypatch):
    pack, seen = _pack(tmp_path / "pack", 4000), _Seen()
    with events.waited_for(lambda: seen):
        load_concept(pack)
    assert seen.calls == []
    monkeypatch.setattr(events, "SHOWN_AFTER", 0.0)
    with events.waited_for(lambda: seen):
        load_concept(pack)
    size = (pack / "forget.jsonl").stat().st_size
    assert seen.calls[0] == ("start", "read concept slow", size) and seen.calls[-1] == ("stop",)
    assert sum(call[1] for call in seen.calls if call[0] == "advance") == size


def test_no_second_bar_is_drawn_beside_a_stage_and_none_where_nobody_waits(tmp_path, monkeypatch):
    pack, seen, other = _pack(tmp_path / "pack", 400), _Seen(), _Seen()
    monkeypatch.setattr(events, "SHOWN_AFTER", 0.0)
    load_concept(pack)
    with events.waited_for(lambda: seen), events.Events(watcher=other).stage("look"):
        load_concept(pack)
    assert seen.calls == [] and other.calls == [("start", "look", None), ("stop",)]
