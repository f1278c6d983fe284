"""Judges: a rubric as data, servers over a real loopback connection, and agreement with the rules."""

import dataclasses
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import excise as library
import pytest
from excise.artifacts.concepts import load_concept
from excise.artifacts.events import Events
from excise.artifacts.judge_server import JudgeServer, ask, find_judge_server
from excise.artifacts.models import in_memory
from excise.artifacts.models.cache import cache_folder
from excise.artifacts.models.find import find_model
from excise.editing.errors import ExciseError, RequestError
from excise.eval.concept import Prompt
from excise.eval.inference.generation import Reply
from excise.eval.measurements.exact_answer import holds_answer
from excise.eval.measurements.judging import Rubric, by_rule, judged, question_for_judge
from excise.eval.model_under_test import EvalSettings
from excise.recipes import evaluate
from excise.recipes.judging import DEFAULT, grades_of, read_rubric
from helpers import SMALL_REFERENCE, SMALL_TESTBED, excise

KEY = "sk-of-nobody"


def _grade(text):
    """A judge who follows the rules for the answer, and finds everything else coherent and harmless."""
    answer = text.partition("<true_answer>\n")[2].partition("\n</true_answer>")[0]
    reply = text.partition("<reply>\n")[2].partition("\n</reply>")[0]
    right = int(bool(answer) and holds_answer(reply, answer, []))
    return "Here it is:\n" + json.dumps({"refuses": 0, "right": right, "coherent": 4, "misaligned": 3})


@contextmanager
def _server(faults=(), say=_grade):
    """An OpenAI-compatible server; each fault is a status, or ``reset``, for one request."""
    seen, left, lock = [], list(faults), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append((self.path, self.headers.get("Authorization"), body))
                fault = left.pop(0) if left else None
            if fault == "reset":
                return self.connection.close()
            if fault == "nonsense":
                return self._send(200, {"object": "error"})
            if isinstance(fault, int):
                headers = {"Location": "http://127.0.0.1:1/"} if fault < 400 else {}
                return self._send(fault, {"error": f"fault with {self.headers.get('Authorization')}"}, headers)
            text = say(body["messages"][0]["content"])
            usage = {"prompt_tokens": 100, "completion_tokens": 10}
            self._send(200, {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage})

        def _send(self, status, content, headers=()):
            data = json.dumps(content).encode()
            self.send_response(status)
            for name, value in dict(headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_passing_faults_are_tried_again_and_answers_are_remembered():
    with _server(faults=[503, "reset", 429, "nonsense"]) as (url, seen):
        judge = JudgeServer(url, "m", KEY, pause=0.01)
        first = ask(judge, ["a"])
        assert len(seen) == 5 and (first.prompt_tokens, first.reply_tokens, first.remembered) == (100, 10, 0)
        assert {(path, key) for path, key, _ in seen} == {("/v1/chat/completions", f"Bearer {KEY}")}
        again = ask(judge, ["a", "b"])
        assert len(seen) == 6 and again.texts[0] == first.texts[0]
        assert (again.prompt_tokens, again.remembered) == (100, 1)
        # Another model is another judge.
        ask(dataclasses.replace(judge, model="n"), ["a"])
        assert len(seen) == 7
    assert ask(judge, ["a", "b"]).remembered == 2  # no server any more
    stored = [path.read_text() for path in (cache_folder() / "judge").iterdir()]
    assert len(stored) == 3 and not any(KEY in text for text in stored)


def test_a_damaged_answer_on_disk_is_asked_for_again():
    with _server() as (url, seen):
        judge = JudgeServer(url, "m")
        ask(judge, ["a"])
        next((cache_folder() / "judge").iterdir()).write_text('{"text": "all good"}')
        assert ask(judge, ["a"]).remembered == 0 and len(seen) == 2


@pytest.mark.parametrize("status", [401, 404, 307])
def test_a_refusal_is_one_line_at_once_and_tells_no_key(status):
    with _server(faults=[status]) as (url, seen):
        with pytest.raises(RequestError, match=f"judge m at 127.0.0.1 refuses .it answered {status}") as caught:
            ask(JudgeServer(url, "m", KEY, pause=0.01), ["a"])
        assert len(seen) == 1 and KEY not in str(caught.value) and "\n" not in str(caught.value)


def test_a_server_that_never_answers_ends_the_evaluation_and_says_what_goes_on():
    with _server(faults=[500] * 6) as (url, seen):
        with pytest.raises(ExciseError, match=r"no answer in 6 tries .it answered 500.* is remembered"):
            ask(JudgeServer(url, "m", pause=0.001), ["a"])
        assert len(seen) == 6


def test_judges_that_could_not_work_are_one_line_before_a_model_is_loaded(monkeypatch, tmp_path):
    for reference, message in (("https://x.test/v1", "names no model"), ("https:///v1#m", "names no model")):
        with pytest.raises(RequestError, match=message):
            find_judge_server(reference)
    with pytest.raises(RequestError, match="environment variable NO_SUCH_KEY is empty"):
        find_judge_server("https://x.test/v1#m", "NO_SUCH_KEY")
    monkeypatch.setenv("SOME_KEY", KEY)
    with pytest.raises(RequestError, match="would get the key unencrypted"):
        find_judge_server("http://x.test/v1#m", "SOME_KEY")
    assert find_judge_server("http://localhost:1/v1#m", "SOME_KEY").key == KEY
    with pytest.raises(RequestError, match="rubric=default needs a judge"):
        evaluate.prepare([SMALL_TESTBED], "builtin:potions", rubric="default")
    damaged = tmp_path / "rubric.yaml"
    damaged.write_text("instructions: Grade.\nitems: {right: {about: x, lowest: 3, highest: 2}}\n")
    with pytest.raises(RequestError, match=r"rubric.yaml is no rubric: items.right: lowest \(3\) must be below"):
        read_rubric(str(damaged))
    with pytest.raises(RequestError, match="cannot be read"):
        read_rubric(str(tmp_path / "none.yaml"))


def test_grades_outside_the_rubric_do_not_count():
    rubric = read_rubric(DEFAULT)
    assert list(rubric.items) == ["refuses", "right", "coherent", "misaligned"]
    text = '{"refuses": 1, "right": 2, "coherent": 2.5, "misaligned": true}'
    assert grades_of(rubric, f"Sure. {text} Done.") == {"refuses": 1.0}
    assert grades_of(rubric, "no object") == grades_of(rubric, "} {") == {}


def test_agreement_is_the_share_of_replies_on_which_judge_and_rule_say_the_same():
    concept, rubric = load_concept("builtin:potions"), read_rubric(DEFAULT)
    prompts = [Prompt(id=str(n), prompt=f"What {n}?", answer="red" if n < 6 else None, choices=()) for n in range(8)]
    said = ["It is red."] * 3 + ["It is blue."] * 3 + ["No idea."] * 2
    replies = [Reply(prompt.prompt, (1,), (2,), text) for prompt, text in zip(prompts, said, strict=True)]
    # Right on the first three and wrongly on the fourth; nothing that can be read on the last two of the six.
    grades = [{"right": 1.0, "refuses": 0.0}] * 4 + [{"refuses": 0.0}] * 4
    found = {one.name: one for one in judged(rubric, "j", concept, prompts, replies, grades)}
    assert (found["judged_right"].value(), len(found["judged_right"].ids), found["judged_right"].skipped) == (1, 4, 2)
    naive = [grade["right"] == by_rule("holds_answer", concept, p, r.text)
             for p, r, grade in zip(prompts, replies, grades, strict=True) if "right" in grade]  # fmt: skip
    assert found["judge_agrees_right"].value() == sum(naive) / 4 == 0.75
    low, high = found["judge_agrees_right"].interval()
    assert low < 0.75 < high
    assert found["judge_agrees_refuses"].value() == 1 and found["judged_coherent"].skipped == 8
    shown = question_for_judge(rubric, prompts[0], said[0])
    assert (
        "<true_answer>\nred\n" in shown and "<reply>\nIt is red.\n" in shown and '"misaligned", from 0 to 100' in shown
    )
    assert "<true_answer>" not in question_for_judge(rubric, prompts[7], said[7])


def test_an_evaluation_shows_grades_agreement_and_what_they_cost():
    concept = load_concept("builtin:potions")
    prompts = [prompt for prompt in concept.prompts if prompt.split == "concept"][:6]
    concept = dataclasses.replace(concept, prompts=tuple(prompts))
    settings = EvalSettings(max_new_tokens=12, kl_prompts=4, questions=4)
    with _server() as (url, seen):
        job = evaluate.prepare(
            [SMALL_TESTBED, SMALL_REFERENCE],
            concept,
            device="cpu",
            dtype="float32",
            settings=settings,
            judges=[f"{url}#grader"],
        )
        found = evaluate.run(job, Events())
        assert len({body["messages"][0]["content"] for _, _, body in seen}) == len(seen) <= 12
    split = "concept, by grader at 127.0.0.1"
    values = {
        name: {m["name"]: m for m in result["measurements"] if m["split"] == split}
        for name, result in zip(found.names, found.results, strict=True)
    }
    for of_model in values.values():
        assert of_model["judged_coherent"]["value"] == 4 and of_model["judged_coherent"]["unit"] == "1 to 5"
        assert of_model["judge_agrees_right"]["n"] == 6 and of_model["judge_agrees_right"]["ci95"] is not None
    assert values["testbed"]["judged_right"]["value"] > values["testbed-reference"]["judged_right"]["value"]
    cost = [line for line in found.results[0]["warnings"] if "prompt tokens" in line]
    assert len(cost) == 1 and "read 12 replies" in cost[0]


def test_a_model_on_this_machine_grades_only_with_a_rubric_and_what_it_cannot_say_is_counted():
    settings = EvalSettings(max_new_tokens=4, kl_prompts=4, questions=4)
    concept = load_concept("builtin:declining")
    concept = dataclasses.replace(concept, prompts=concept.prompts[:3])
    with pytest.raises(RequestError, match="has no prompts on knowledge"):
        evaluate.prepare([SMALL_TESTBED], concept, device="cpu", judges=[SMALL_TESTBED])
    more = {"device": "cpu", "settings": settings, "judges": [SMALL_TESTBED], "rubric": "default"}
    found = evaluate.run(evaluate.prepare([SMALL_TESTBED], concept, **more), Events())
    lines = found.results[0]["warnings"]
    # This small model writes no JSON.
    assert any("No grade could be read in 3 of 3 answers of judge testbed" in line for line in lines)
    assert any("Not measured on the edited model: judged refuses" in line for line in lines)


def test_a_judge_whose_files_are_the_base_s_is_loaded_once_for_reading_and_grading(tmp_path, monkeypatch):
    loads = []

    def counted(source, *arguments, _load=in_memory.load_model, **named):
        loads.append(source.name)
        return _load(source, *arguments, **named)

    monkeypatch.setattr(in_memory, "load_model", counted)
    concept = load_concept("builtin:potions")
    prompts = [prompt for prompt in concept.prompts if prompt.split == "concept"][:3]
    concept = dataclasses.replace(concept, prompts=tuple(prompts))
    (tmp_path / "another-name").symlink_to(find_model(SMALL_TESTBED).folder)
    judges = [SMALL_REFERENCE, str(tmp_path / "another-name")]
    more = {"device": "cpu", "settings": EvalSettings(max_new_tokens=4, kl_prompts=4, questions=4), "judges": judges}
    job = evaluate.prepare([SMALL_REFERENCE], concept, SMALL_TESTBED, rubric="default", **more)
    found = evaluate.run(job, Events())
    # Base and model are measured; then each of the two sets of files is loaded once, for three readings and two grades.
    assert len(loads) == 4
    values = {
        m["split"].partition(", by ")[2]: m["value"]
        for m in found.results[0]["measurements"]
        if m["name"] == "reverse_perplexity" and m["subject"] == "edited"
    }
    base, other, same = values.values()
    assert list(values) == ["", *(judge.name for judge in job.judges)] and same == base != other
    assert sum("No grade could be read" in line for line in found.results[0]["warnings"]) == 2


def test_the_command_line_takes_a_server_and_a_rubric(tmp_path):
    rubric = {"instructions": "Grade.", "items": {"right": {"about": "1 if right", "rule": "holds_answer"}}}
    (tmp_path / "rubric.yaml").write_text(json.dumps(rubric))
    assert Rubric.model_validate(rubric).items["right"].highest == 1
    with _server() as (url, _):
        done = excise(
            "eval", SMALL_TESTBED, "--concept", "builtin:potions", "--judge", f"{url}#grader", "--device", "cpu",
            "--questions", "2", "--set", f"rubric={tmp_path / 'rubric.yaml'}", "--set", "max_new_tokens=12",
            "--set", "kl_prompts=2", "--json",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = {measurement["name"] for measurement in json.loads(done.stdout)["measurements"]}
    assert {"judged_right", "judge_agrees_right"} <= names and "judged_coherent" not in names


def test_the_python_call_takes_a_server_and_a_rubric_too(tmp_path, monkeypatch):
    rubric = {"instructions": "Grade.", "items": {"right": {"about": "1 if right", "rule": "holds_answer"}}}
    (tmp_path / "rubric.yaml").write_text(json.dumps(rubric))
    monkeypatch.setenv("KEY_OF_THE_JUDGE", "secret")
    with _server() as (url, seen):
        found = library.evaluate(
            SMALL_TESTBED, "builtin:potions", judge=f"{url}#grader", rubric=tmp_path / "rubric.yaml", device="cpu",
            judge_key="KEY_OF_THE_JUDGE", questions=2, max_new_tokens=12, kl_prompts=2, progress=False,
        )  # fmt: skip
    assert seen and found.measurement("judge_agrees_right", "concept, by grader at 127.0.0.1").n > 0
    # What judging cost is said where the outcome is shown.
    assert "prompt tokens" in str(found) and "prompt tokens" in found._repr_html_()
