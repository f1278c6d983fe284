import json

import pyarrow
import pytest
from benchmark_sets import files_of
from excise.editing.errors import ConceptError, RequestError
from excise.recipes.data.datasets import find_data
from helpers import excise
from loopback_hub import client
from loopback_hub import hub as running_hub
from pyarrow import parquet

CHAT = [("user", "Do it."), ("assistant", "Done.")]
TURNS = [{"role": role, "content": text} for role, text in CHAT]
CHATS = {
    "messages": {"messages": TURNS},
    "messages beside other columns": {"prompt": "Do it.", "prompt_id": "1", "text": "all of it", "messages": TURNS},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Do "}, {"type": "text", "text": "it."}]},
                           TURNS[1]]},
    "ShareGPT": {"id": "7", "conversations": [{"from": "human", "value": "Do it."}, {"from": "gpt", "value": "Done."}]},
    "Alpaca": {"instruction": "Do it.", "input": "", "output": "Done.", "text": None},
    "a prompt with a response": {"prompt": "Do it.", "response": "Done."},
}  # fmt: skip


def _file(tmp_path, rows, name="rows.jsonl"):
    path = tmp_path / name
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", CHATS)
def test_chats_of_every_known_form_are_the_same_chat(name, ending, tmp_path):
    if name == "parts" and ending == "parquet":
        pytest.skip("a parquet column has one type, and the parts of one turn are a list")
    data = find_data(_file(tmp_path, [CHATS[name]] * 2, f"rows.{ending}"))
    assert [(turn.role, turn.content) for turn in data.rows[1].messages] == CHAT
    assert data.rows[0].prompt is None and data.rows[0].text is None and len(data.sha256) == 64


def test_other_rows_are_completions_or_texts(tmp_path):
    rows = [
        {"prompt": "a", "completion": " b"},
        {"text": "c"},
        {"question": "d?", "answer": "e"},
        {"instruction": "f", "input": "g", "output": "h"},
    ]
    found = find_data(_file(tmp_path, rows)).rows
    assert [(row.prompt, row.completion) for row in found[:3:2]] == [("a", " b"), ("Question: d?\nAnswer:", " e")]
    assert found[1].text == "c" and found[3].messages[0].content == "f\n\ng"


def test_a_map_names_columns_of_any_set(tmp_path):
    file = _file(tmp_path, [{"q": "a?", "r": "b"}])
    with pytest.raises(ConceptError, match=r"rows.jsonl:1: its columns q, r are of no known form"):
        find_data(file)
    assert find_data(file, "question=q,answer=r").rows[0].completion == " b"
    assert find_data(file, "text=r").rows[0].text == "b"
    with pytest.raises(ConceptError, match=r"rows.jsonl:1: has no column s"):
        find_data(file, "text=s")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": "hi"}, "messages is not a list of turns"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "the role 'narrator'"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "calls a tool"),
        ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, "something other than text"),
        ({"conversations": [7]}, "a turn of conversations is a number"),
        ({"instruction": "a", "output": 7}, "output is a number"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "prompt and completion must both be there"),
    ],
)
def test_a_row_that_cannot_be_learned_is_named_by_its_place(row, reason, tmp_path):
    with pytest.raises(ConceptError, match=rf"rows.jsonl:2: .*{reason}"):
        find_data(_file(tmp_path, [{"text": "fine"}, row]))
    with pytest.raises(RequestError, match=r"is no file; give a file"):
        find_data(str(tmp_path / "absent.csv"))


def test_a_set_on_the_hub_is_read_with_configuration_split_and_commit(tmp_path):
    with running_hub() as known:
        sets = {
            "chats": {"train": [CHATS["messages"]] * 3, "held": [CHATS["messages"]] * 2},
            "texts": {"train": [{"text": "a"}]},
        }
        commit = known.add_set("org/chats", files_of(sets))
        environment = {**client(known, tmp_path / "hf"), "HF_DATASETS_CACHE": str(tmp_path / "sets")}
        for ref, count in ((f"hub:org/chats:chats:held@{commit}", 2), ("hub:org/chats:chats@v1", 3)):
            done = excise("run", "caft", "--set", f"data={ref}", "--dry-run", "--json", **environment)
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["rows_to_learn"] == count
        done = excise("run", "caft", "--set", "data=org/chats", "--dry-run", **environment)
        assert done.returncode == 2 and "several configurations; give one of chats, texts" in done.stderr
