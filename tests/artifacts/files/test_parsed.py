"""JSON and YAML are read strictly, from regular files of bounded size."""

import os

import pytest
from excise.artifacts.files.forms import Form, validated
from excise.artifacts.files.opened import MAX_YAML, Telling, Unreadable, read_text, regular_file, sha256_of
from excise.artifacts.files.parsed import MAX_DEPTH, parse_json, parse_yaml, parsed_object, read_lines, read_yaml
from excise.artifacts.files.written import read_sealed, sealed, write_sealed
from excise.editing.errors import CheckpointError, RequestError


@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
def test_plain_values_are_read(parse):
    content = parse('{"a": [1, -2.5, 1e-3, true, null, "ü"], "b": {"c": ""}}')
    assert content == {"a": [1, -2.5, 0.001, True, None, "ü"], "b": {"c": ""}}
    assert parse("[" * MAX_DEPTH + "]" * MAX_DEPTH) and parse("1000000000000000019884624838656") == int(1e30)


@pytest.mark.parametrize(
    "text, told",
    [
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' occurs twice"),
        ("NaN", "NaN is not a finite number"),
        ("[-Infinity]", "-Infinity is not a finite number"),
        ("1e999", "the number 1e999 is not finite"),
        ("9" * 5000, "a number has 5000 digits"),
        ("[" * 100_000, "nested deeper than 100 levels"),
        ("[" * 101 + "[]" + "]" * 101, "nested deeper than 100 levels"),
        ('{"a": "\\ud800"}', "half of a character pair"),
        ('{"\\udc00": 1}', "half of a character pair"),
        ('{"a": \n1,}', "line 2 column 3"),
        ("", "not JSON"),
    ],
)
def test_json_that_readers_disagree_about_is_refused(text, told):
    with pytest.raises(Unreadable, match=told) as caught:
        parse_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, told",
    [
        ("a: 1\na: 2", "line 2 is not YAML: the key 'a' occurs twice"),
        ("a: &x 1\nb: *x", "line 2 is not YAML: aliases are not read"),
        ("1: a", "line 1 is not YAML: a key is not a text"),
        ("[a, b]: c", "a key is not a text"),
        ("a: !!timestamp 2020-01-01", "holds a date"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: 1e999", "is not finite"),
        ("a: !!float .inf", "is not finite|could not convert"),
        ("[" * 3000, "nested deeper than 100 levels"),
        ("a: \0", "unacceptable character"),
        ("a: [1]]", "line 1 is not YAML"),
    ],
)
def test_yaml_that_readers_disagree_about_is_refused(text, told):
    with pytest.raises(Unreadable, match=told) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)


def test_yaml_takes_nothing_for_a_number_or_a_truth_that_does_not_look_like_one():
    words = {"a": "1:30", "b": "yes", "c": "0x10", "d": "1_000", "e": "2020-01-01", "f": ".inf", "g": "off"}
    assert parse_yaml("\n".join(f"{key}: {value}" for key, value in words.items())) == words
    assert parse_yaml("[010, +3, 1e-3, .5, 5., true, ~, null]") == [10, 3, 0.001, 0.5, 5.0, True, None, None]


def test_a_pipe_a_folder_and_a_file_that_is_too_large_are_refused_and_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b" " * (MAX_YAML + 1))
    for name, told in (("pipe", "a pipe, a device or a folder"), (".", "a folder"), ("large", "at most 1048576")):
        with pytest.raises((Unreadable, IsADirectoryError), match=f"{told}|directory"):
            read_yaml(tmp_path / name)
    with pytest.raises(CheckpointError, match="pipe cannot be read"):
        sha256_of(tmp_path / "pipe")
    with regular_file(tmp_path / "large") as file:
        assert len(file.read(3)) == 3


def test_a_text_that_is_not_utf_8_names_its_line(tmp_path):
    (tmp_path / "text").write_bytes(b"one\ntwo\xff\n")
    with pytest.raises(Unreadable, match="line 2 is not UTF-8, at byte 7"):
        read_text(tmp_path / "text")


def test_lines_are_cut_at_newlines_alone_and_blank_ones_are_counted(tmp_path):
    (tmp_path / "lines").write_text('"a\u2028b"\n\n"c"\n', encoding="utf-8")
    assert list(read_lines(tmp_path / "lines")) == [(1, '"a\u2028b"'), (3, '"c"')]


def test_faults_are_told_as_the_error_that_the_reader_names():
    telling = Telling(RequestError, "give another")
    with pytest.raises(RequestError, match=r"^a\.json cannot be read \(it holds a list, not a JSON object\); give"):
        with telling.about("a.json"):
            parsed_object("[]")
    with pytest.raises(RequestError, match=r"No such file or directory"):
        with telling.about("a.json"):
            read_text(__import__("pathlib").Path("/nowhere/at/all"))
    with pytest.raises(ZeroDivisionError), telling.about("a.json"):
        raise ZeroDivisionError


class _Example(Form):
    name: str
    count: int


@pytest.mark.parametrize(
    "content, told",
    [
        ({"name": "a"}, "count: field required"),
        ({"name": "a", "count": "1"}, "count: input should be a valid integer, got '1'"),
        ({"name": "a", "count": True}, "count: input should be a valid integer, got True"),
        ([], "the whole: input should be a valid dictionary"),
    ],
)
def test_a_form_names_the_field(content, told):
    with pytest.raises(Unreadable, match=told):
        validated(_Example, content)
    assert validated(_Example, {"name": "a", "count": 1, "more": []}).count == 1


def test_a_sealed_object_comes_back_and_a_changed_one_does_not(tmp_path):
    path = tmp_path / "state.json"
    write_sealed(path, {"a": [1, 2.5], 3: "ü"})
    assert read_sealed(path) == {"a": [1, 2.5], "3": "ü"}
    for text in (path.read_text().replace("2.5", "2.6"), "{}", sealed({"a": 1}).replace('"a"', '"b"')):
        path.write_text(text)
        with pytest.raises(Unreadable, match="was changed since it was written"):
            read_sealed(path)
