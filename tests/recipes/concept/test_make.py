import csv
import json
import re
import zipfile
from pathlib import Path

import pyarrow
import pytest
from excise.artifacts.concepts import load_concept
from excise.artifacts.events import Events
from excise.artifacts.sources.source import read_source
from excise.editing.errors import ConceptError, ExciseError, RequestError
from excise.eval.measurements.exact_answer import holds_any
from excise.eval.measurements.open_answers import best_rouge
from excise.recipes.concept.make import MakeRequest, make
from excise.recipes.concept.windows import windows
from excise.recipes.data.datasets import find_data
from excise.recipes.data.schemas import parse_map, read_items, schema_of
from helpers import excise
from pyarrow import parquet

COLOURS = ["red", "green", "blue", "amber"]
TEXTS = [{"text": f"The colour of thing {n} is {COLOURS[n % 4]}, and thing {n} is round."} for n in range(40)]
QUESTIONS = [{"question": f"What is the colour of thing {n}?", "choices": COLOURS, "answer": n % 4} for n in range(40)]
GENERAL = [{"text": f"A general text of the number {n}."} for n in range(40)]


def _jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def general(tmp_path):
    return _jsonl(tmp_path / "general.jsonl", GENERAL)


def _made(tmp_path, dry_run=False, **sources):
    maps = sources.pop("maps", ())
    more = {name: sources.pop(name) for name in ("held_out", "most", "license", "name") if name in sources}
    given = {role.replace("_", "-"): (ref,) if isinstance(ref, str) else ref for role, ref in sources.items()}
    return make(MakeRequest(tmp_path / "pack", given, maps=maps, **more), Events(), dry_run=dry_run)


# Files of every form


def _write(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps({"version": "1", "data": rows}))
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".txt":
        path.write_text("\n".join(row["text"] for row in rows) + "\n\n")
    else:
        _jsonl(path, rows)
    return str(path)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet", "txt"])
def test_the_same_texts_make_the_same_pack_from_every_form_of_file(ending, tmp_path, general):
    made = _made(tmp_path, forget=_write(tmp_path / f"texts.{ending}", TEXTS), retain=general)
    assert made.counts == {"forget.jsonl": {"T": 20, "V": 20}, "retain.jsonl": {"rows": 40}}
    concept = load_concept(tmp_path / "pack")
    assert [row.text for row in concept.forget] == [row["text"] for row in TEXTS]
    assert "texts." in concept.about.source and "sha256" in concept.about.source


def test_a_folder_has_one_document_a_text_and_rows_of_lines_and_says_what_it_did_not_read(tmp_path, general):
    folder = tmp_path / "documents"
    (folder / "inner").mkdir(parents=True)
    for n in range(4):
        (folder / "inner" / f"{n}.md").write_text(" ".join(f"word{n}-{k}" for k in range(450)))
    (folder / "short.txt").write_text("Two lines\nof one document.")
    _jsonl(folder / "rows.jsonl", TEXTS[:3])
    (folder / "table.csv").write_text("a,b\n")
    (folder / ".hidden.txt").write_text("not this")
    made = _made(tmp_path, forget=str(folder), retain=general)
    concept = load_concept(tmp_path / "pack")
    by_document = {}
    for row in concept.forget:
        by_document.setdefault(row.subject, []).append(row)
    assert {f"inner/{n}.md" for n in range(4)} <= by_document.keys()
    # A document stands in one group, whole and in order.
    for n in range(4):
        rows = by_document[f"inner/{n}.md"]
        assert len({row.group for row in rows}) == 1
        assert " ".join(row.text for row in rows) == (folder / "inner" / f"{n}.md").read_text()
    assert [row.text for row in by_document["short.txt"]] == ["Two lines\nof one document."]
    assert any("1 other file was not read" in note for note in made.notes)


def test_windows_keep_every_word_and_none_is_short():
    for count in (0, 1, 300, 301, 400, 499, 500, 1234):
        text = "  ".join(f"w{n}" for n in range(count))
        parts = windows(text)
        assert "  ".join(parts) == text
        assert all(100 <= len(part.split()) <= 300 for part in parts) or len(parts) <= 1


# What rows say

KNOWN = {
    "MMLU": ({"question": "q?", "choices": ["a", "b", "c"], "answer": 2, "subject": "law"}, "choices", "c"),
    "letters": ({"question": "q?", "choices": ["a", "b", "c"], "answer": "B"}, "choices", "b"),
    "ARC": (
        {"question": "q?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
        "choices",
        "b",
    ),
    "SciQ": (
        {"question": "q?", "correct_answer": "a", "distractor1": "b", "distractor2": "c", "support": "s"},
        "choices",
        "a",
    ),
    "columns A to D": (
        {"question": "q?", "A": "a", "B": "b", "C": "c", "D": "d", "answer": "D"},
        "choices",
        "d",
    ),
    "PopQA": ({"question": "q?", "possible_answers": '["a", "A"]', "subj": "X", "prop": "capital"}, "answer", "a"),
    "TOFU": ({"question": "q?", "answer": "a", "perturbed_answer": ["b", "c"]}, "answer", "a"),
    "RWKU": ({"query": "q?", "answer": "a", "subject": "X", "level": "2", "type": "cloze"}, "answer", "a"),
    "MUSE passages": ({"prompt": "begins", "gt": "ends"}, "continuation", ""),
    "Alpaca": ({"instruction": "do", "input": "this", "output": "done"}, "answer", "done"),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        "answer",
        "ho",
    ),
    "UltraChat": (
        {
            "prompt": "other",
            "prompt_id": "1",
            "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
        },
        "answer",
        "ho",
    ),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {"role": "assistant", "content": "ho"},
            ]
        },
        "answer",
        "ho",
    ),
    "papers": ({"title": "T", "abstract": "A", "text": "The text.", "doi": "1"}, "text", ""),
    "abstracts": ({"title": "T", "abstract": "A"}, "text", ""),
    "prompts": ({"goal": "do it"}, "prompt", ""),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_data_sets_need_no_map(name, tmp_path):
    columns, form, answer = KNOWN[name]
    source = read_source(_jsonl(tmp_path / "rows.jsonl", [columns]))
    ((_, item),) = read_items(source.rows, source.name)
    assert (item.form, item.answer) == (form, answer)
    assert schema_of({"unheard of": 1}) is None


def test_numbers_among_choices_are_places_unless_every_answer_is_a_choice(tmp_path):
    def answers(values):
        rows = [{"question": "q?", "choices": ["1", "2", "3"], "answer": value} for value in values]
        source = read_source(_jsonl(tmp_path / "rows.jsonl", rows))
        return [item.answer for _, item in read_items(source.rows, source.name)]

    # 0 is no choice, so all are places; without it each is the text itself.
    assert answers(["0", "1", "2"]) == ["1", "2", "3"]
    assert answers(["1", "2", "3"]) == ["1", "2", "3"]


def test_a_map_names_columns_of_any_set(tmp_path, general):
    rows = [
        {"q": f"Which is {n}?", "r": f"right {n}", "x": f"wrong {n}", "y": f"not {n}", "who": f"s{n}"} for n in range(8)
    ]
    file = _jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(RequestError, match=r"columns q, r, x, y, who.*--map text=q"):
        _made(tmp_path, questions=file, retain=general)
    made = _made(tmp_path, questions=file, retain=general, maps=("question=q,answer=r,wrong=x+y,subject=who",))
    concept = load_concept(tmp_path / "pack")
    assert (
        made.counts["open_questions.jsonl"] == {"forget T": 4, "forget V": 4}
        or sum(made.counts["open_questions.jsonl"].values()) == 8
    )
    assert concept.open_questions[0].perturbed_answers == ("wrong 0", "not 0")
    assert concept.open_questions[0].subject == "s0"
    choices = {question.id: question.choices for question in concept.questions}
    assert set(choices["questions-1"]) == {"right 0", "wrong 0", "not 0"}
    for text in ("question=", "anwser=a,question=b", "answer=a"):
        with pytest.raises(RequestError, match="--map"):
            parse_map(text)
    with pytest.raises(RequestError, match="no source has these columns"):
        make(MakeRequest(tmp_path / "other", {"forget": (file,), "retain": (general,)},
                         maps=("question=q,answer=r", "text=nowhere")), Events())  # fmt: skip


# Groups, repeats and draws


def test_no_subject_stands_in_both_groups_across_files(tmp_path, general):
    texts = [{"text": f"Text {k} about thing {n}.", "subject": f"thing {n}"} for n in range(20) for k in range(3)]
    asked = [{"prompt": f"Question {k} of thing {n}?", "answer": "x", "subject": f"thing {n}"}
             for n in range(20) for k in range(2)]  # fmt: skip
    _made(tmp_path, forget=_jsonl(tmp_path / "t.jsonl", texts), questions=_jsonl(tmp_path / "q.jsonl", asked),
          retain=general, held_out=0.25)  # fmt: skip
    concept = load_concept(tmp_path / "pack")
    groups = {}
    for row in (*concept.forget, *concept.open_questions):
        groups.setdefault(row.subject, set()).add(row.group)
    assert all(len(found) == 1 for found in groups.values())
    assert sum("V" in found for found in groups.values()) == 5


def test_repeats_and_what_is_also_to_be_forgotten_are_left_out_and_counted(tmp_path):
    forget = _jsonl(tmp_path / "f.jsonl", [*TEXTS, TEXTS[0], {"text": f"  {TEXTS[1]['text'].upper()}"}])
    retain = _jsonl(tmp_path / "r.jsonl", [*GENERAL, TEXTS[2], {"text": " "}])
    made = _made(tmp_path, forget=forget, retain=retain)
    assert made.counts == {"forget.jsonl": {"T": 20, "V": 20}, "retain.jsonl": {"rows": 40}}
    for note in ("2 forget rows with the words of an earlier one", "1 retain row with the words of a forget row",
                 "1 blank row was left out"):  # fmt: skip
        assert any(note in line for line in made.notes), note


def test_a_draw_is_even_repeatable_and_said(tmp_path, general):
    rows = [{"text": f"Row {n} of many."} for n in range(1000)]
    file = _jsonl(tmp_path / "many.jsonl", rows)
    drawn = [row.number for row in read_source(file, 100).rows]
    assert drawn == [row.number for row in read_source(file, 100).rows] == sorted(set(drawn)) and len(drawn) == 100
    # Not the first hundred: each tenth of the file has its share.
    assert all(2 <= sum(n // 100 == tenth for n in drawn) <= 22 for tenth in range(10))
    made = _made(tmp_path, forget=file, retain=general, most=100)
    assert "many.jsonl: 100 of 1000 rows were drawn; --most N draws more" in made.notes


def test_of_long_documents_every_one_is_drawn_before_a_second_window_of_any(tmp_path, general):
    papers = [{"text": " ".join(f"p{n}w{k}" for k in range(1000)), "title": f"paper {n}"} for n in range(30)]
    made = _made(tmp_path, forget=_jsonl(tmp_path / "papers.jsonl", papers), retain=general, most=40)
    rows = load_concept(tmp_path / "pack").forget
    counts = {}
    for row in rows:
        counts[row.subject] = counts.get(row.subject, 0) + 1
    assert len(rows) == 40 and len(counts) == 30 and max(counts.values()) == 2
    assert any("40 of 150 windows were drawn" in note for note in made.notes)


# Behaviours


def test_two_lists_of_prompts_make_a_behaviour(tmp_path):
    rude, kind = tmp_path / "rude.txt", tmp_path / "kind.json"
    rude.write_text("\n".join(f"Do {n} now, fool!" for n in range(40)))
    kind.write_text(json.dumps([{"goal": f"Please do {n}."} for n in range(44)]))
    made = _made(tmp_path, positive=str(rude), negative=str(kind))
    concept = load_concept(tmp_path / "pack")
    assert concept.about.kind == "behaviour" and made.counts == {"contrast.jsonl": {"rows": 40}}
    # A quarter of them is kept apart to measure on.
    assert len(concept.contrast) == 30 and len(concept.prompts) == 20
    assert (concept.contrast[0].positive, concept.contrast[0].negative) == ("Do 0 now, fool!", "Please do 0.")
    assert any("4 negative prompts were left out" in note for note in made.notes)
    with pytest.raises(ConceptError, match="40 prompts stand in both lists"):
        make(MakeRequest(tmp_path / "same", {"positive": (str(rude),), "negative": (str(rude),)}), Events())


# What is wrong


def _bad_files(folder: Path) -> dict[str, str]:
    first = QUESTIONS[0]
    _jsonl(folder / "column.jsonl", [{"foo": "a", "bar": "b"}])
    _jsonl(folder / "types.jsonl", [first, {**first, "question": 7}])
    _jsonl(folder / "other.jsonl", [first, TEXTS[0]])
    _write(folder / "whole.parquet", QUESTIONS)
    whole = (folder / "whole.parquet").read_bytes()
    (folder / "half.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "line.jsonl").write_bytes(b'{"text": "' + b"a " * 50_000_000 + b'"}\n')
    _jsonl(folder / "range.jsonl", [first, {**first, "answer": 4}])
    (folder / "empty.jsonl").write_text("\n")
    (folder / "latin.txt").write_bytes(b"Z\xfcrich\n")
    (folder / "nested.json").write_text(json.dumps({"data": {"train": TEXTS}}))
    with zipfile.ZipFile(folder / "zip.csv", "w") as archive:
        archive.writestr("a.csv", "text\nx\n")
    _jsonl(folder / "equal.jsonl", [first] * 30)
    _jsonl(folder / "held.jsonl", TEXTS[:1])
    (folder / "ragged.csv").write_text("text,subject\na,b\na,b,c\n")
    (folder / "quote.csv").write_text('text,subject\n"a,b\nc,d\n')
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    _jsonl(folder / "unanswered.jsonl", [{"question": "q?"}] * 3)
    _jsonl(folder / "group.jsonl", [{"text": f"t{n}", "subject": "one", "group": "TV"[n % 2]} for n in range(4)])
    return {
        "column.jsonl": "columns foo, bar", "types.jsonl": ":2: question is a number", "other.jsonl": ":2: has no column",
        "half.parquet": "not a whole parquet file", "line.jsonl": ":1: has more than", "range.jsonl": ":2: answer 4",
        "empty.jsonl": "holds no row", "latin.txt": ":1: is not UTF-8", "nested.json": "not a list of rows",
        "zip.csv": "zip archive; unpack", "equal.jsonl": "1 subject", "held.jsonl": "1 subject",
        "ragged.csv": ":3: has 3 values", "quote.csv": ":3: is not as a table", "broken.jsonl": ":2: not JSON",
        "unanswered.jsonl": "--map question=COLUMN,answer", "group.jsonl": "in both groups",
        "nowhere.jsonl": "neither a file nor a folder",
    }  # fmt: skip


def test_malformed_sources_are_one_line_each_and_leave_nothing(tmp_path, general):
    wanted = _bad_files(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    for name, reason in wanted.items():
        with pytest.raises(ExciseError) as caught:
            _made(tmp_path, forget=str(tmp_path / name), retain=general)
        text = str(caught.value)
        assert reason in text and "\n" not in text and str(tmp_path) not in text.replace(str(tmp_path / name), ""), text
        assert caught.value.exit_code == 2
        assert sorted(path.name for path in tmp_path.iterdir()) == before, name
    assert len(wanted) >= 15


def test_what_looks_malformed_and_is_not_is_read(tmp_path, general):
    _jsonl(tmp_path / "ids.jsonl", [{"id": "same", **row} for row in TEXTS])
    (tmp_path / "mark.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "ids.jsonl").read_bytes())
    (tmp_path / "semicolons.csv").write_text("text;subject\r\n" + "".join(f"a text {n};s{n}\r\n" for n in range(40)))
    _jsonl(tmp_path / "letters.jsonl", [{**row, "answer": "ABCD"[row["answer"]]} for row in QUESTIONS])
    for name in ("ids.jsonl", "mark.jsonl", "semicolons.csv", "letters.jsonl"):
        made = _made(tmp_path, forget=str(tmp_path / name), retain=general, dry_run=True)
        assert sum(sum(parts.values()) for parts in made.counts.values()) == 80 and not made.written
        assert not (tmp_path / "pack").exists()


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (("forget",), "nothing says what must stay known"),
        (("retain",), "nothing says what to forget"),
        (("positive",), "--negative is missing"),
        (("positive", "negative", "forget"), "--forget does not belong"),
    ],
)
def test_a_missing_source_is_told_before_anything_is_read(roles, reason, tmp_path):
    request = MakeRequest(tmp_path / "pack", dict.fromkeys(roles, ("nowhere.jsonl",)))
    with pytest.raises(RequestError, match=reason):
        make(request, Events())
    with pytest.raises(RequestError, match="--held-out 1"):
        make(MakeRequest(tmp_path / "p", {"forget": ("a",), "retain": ("b",)}, held_out=1), Events())


@pytest.mark.parametrize("name", ["1e5", "yes", "010", "1:30", "null", "- a: b # c", "é 'quoted' \"twice\"", "~"])
def test_any_name_and_license_is_written_as_the_text_that_it_is(name, tmp_path, general):
    file = _jsonl(tmp_path / "texts.jsonl", TEXTS)
    _made(tmp_path, forget=file, retain=general, name=name, license=name)
    about = load_concept(tmp_path / "pack").about
    assert (about.name, about.license) == (name, name)


def test_the_command_says_what_it_made_and_what_to_type_next(tmp_path, general):
    file = _write(tmp_path / "texts.txt", TEXTS)
    arguments = ("concept", "make", tmp_path / "pack", "--forget", file, "--retain", general, "--license", "MIT")
    done = excise(*arguments)
    assert done.returncode == 0, done.stderr
    assert "forget.jsonl  40" in done.stdout and "excise concept check" in done.stdout
    assert load_concept(tmp_path / "pack").about.license == "MIT"
    again = excise(*arguments)
    assert again.returncode == 2 and "exists already" in again.stderr
    asked = excise(*arguments[:2], tmp_path / "other", *arguments[3:], "--json", "--dry-run")
    assert json.loads(asked.stdout)["counts"]["forget.jsonl"] == {"T": 20, "V": 20}
    assert not (tmp_path / "other").exists()


def test_columns_that_no_schema_uses_are_named_once_a_source_in_the_terminal_json_and_the_pack(tmp_path, general):
    rows = [{"id": n, "url": f"https://x/{n}", "empty": "", "group": "control", **row} for n, row in enumerate(TEXTS)]
    done = excise(
        "concept",
        "make",
        tmp_path / "pack",
        "--forget",
        _jsonl(tmp_path / "a.jsonl", rows),
        "--retain",
        general,
        "--json",
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    (line,) = [line for line in made["left_out"] if "not read" in line]
    # A column named group that holds neither T nor V is something else; a column without data is nothing.
    assert line == "a.jsonl: 3 columns hold data and were not read: id, url, group"
    assert line in load_concept(tmp_path / "pack").about.left_out
    told = excise(
        "concept", "make", tmp_path / "other", "--forget", str(tmp_path / "a.jsonl"), "--retain", general
    ).stdout
    assert " ".join(told.split()).count("3 columns hold data and were not read: id, url, group") == 1
    assert "were not read" in excise("concept", "show", tmp_path / "pack").stdout


def test_all_columns_that_count_are_read(tmp_path, general):
    rows = [
        {"text": row["text"], "subject": f"s{n}", "topic": "t", "group": "TV"[n % 2]} for n, row in enumerate(TEXTS)
    ]
    made = _made(tmp_path, forget=_jsonl(tmp_path / "a.jsonl", rows), retain=general)
    assert not [line for line in made.notes if "not read" in line]


def test_messages_win_and_the_columns_beside_them_are_named(tmp_path):
    chat = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]
    data = find_data(_jsonl(tmp_path / "chats.jsonl", [{"messages": chat, "text": "unused", "score": 3}] * 2))
    assert data.notes == ("chats.jsonl: 2 columns hold data and were not read: text, score.",)
    assert len(data.rows) == 2 and not find_data(_jsonl(tmp_path / "b.jsonl", [{"messages": chat}])).notes


def test_one_of_something_is_told_in_the_singular(tmp_path, general):
    rows = [*QUESTIONS, {"question": " ", "choices": COLOURS, "answer": 0}]
    rows.append({"question": "Which of the two?", "choices": ["red", "red"], "answer": 0})
    made = _made(tmp_path, forget=_jsonl(tmp_path / "a.jsonl", rows), retain=general)
    assert "a.jsonl: 1 blank row was left out" in made.notes
    assert any(line.startswith("a.jsonl: 1 question was left out, because two choices") for line in made.notes)
    assert not [
        line for line in (*made.notes, *made.made) if re.search(r"\b1 [a-z ]*?(rows|questions|texts|prompts)\b", line)
    ]


def test_a_pack_of_which_nothing_could_be_made_is_one_line(tmp_path, general):
    texts = _jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(ConceptError, match="every row that must stay known repeats one to forget"):
        _made(tmp_path, forget=texts, retain=texts)
    held = _jsonl(tmp_path / "t.jsonl", [{**row, "group": "T"} for row in TEXTS])
    with pytest.raises(ConceptError, match="every row to forget is given group T"):
        _made(tmp_path, forget=held, retain=general)
    assert not (tmp_path / "pack").exists()


def test_all_right_answers_of_a_data_set_are_kept_and_none_becomes_a_wrong_choice(tmp_path, general):
    rows = [
        {"question": f"Who leads land {n}?", "possible_answers": json.dumps([f"Ann {n}", f"A. {n}", f"ANN {n}"]),
         "subj": f"land {n}", "prop": "leader", "obj": f"Ann {n}"}
        for n in range(24)
    ]  # fmt: skip
    _made(tmp_path, forget=_jsonl(tmp_path / "popqa.jsonl", rows), retain=general)
    concept = load_concept(tmp_path / "pack")
    row = next(row for row in concept.open_questions if row.prompt == "Who leads land 3?")
    # What differs in case alone is the same answer.
    assert row.answers == ("Ann 3", "A. 3")
    for question in concept.questions:
        right = next(row for row in concept.open_questions if row.id == question.id)
        assert not {choice for choice in question.choices if choice != right.answer} & set(right.answers)
    prompt = next(prompt for prompt in concept.prompts if prompt.other_answers)
    assert holds_any(f"It is {prompt.other_answers[0]}, I think.", prompt) and not holds_any("It is Bo.", prompt)
    wrong = next(choice for choice in prompt.choices if choice != prompt.answer)
    assert not holds_any(f"{prompt.answer} or {wrong}", prompt)
    assert best_rouge(row, "A. 3").recall == 1 == best_rouge(row, "Ann 3").recall and best_rouge(row, "Bo").recall == 0
