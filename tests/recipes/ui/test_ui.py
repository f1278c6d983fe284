"""The local page in a real browser: it does what it says, and answers nobody but whoever started it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

import pytest
from browser import opened
from excise.recipes.ui import audits
from helpers import SMALL_REFERENCE, SMALL_TESTBED, excise, run_on_knowledge, started

pytest.importorskip("nicegui", reason="no nicegui: pip install '.[ui]'")

HOSTILE = '<script>window.hacked=1</script><img src="http://127.0.0.1:PORT/x" onerror="window.hacked=1">'


@pytest.fixture(scope="module")
def elsewhere():
    """Somewhere that no page may call."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening


@pytest.fixture(scope="module")
def served(tmp_path_factory, elsewhere):
    """The page over two runs on knowledge, one of them with a hostile card and name."""
    runs = tmp_path_factory.mktemp("runs")
    run_on_knowledge(runs / "first")
    other = runs / "other <i>"
    shutil.copytree(runs / "first", other)
    port = elsewhere.getsockname()[1]
    hostile = HOSTILE.replace("PORT", str(port))
    with (other / "checkpoint" / "README.md").open("a") as card:
        card.write(f"\n{hostile}\n\n[link](javascript:window.hacked=1) ![picture](http://127.0.0.1:{port}/x)\n")
    (other / "report.html").write_text(
        f"<p>mine</p>{hostile}<script>window.ran=1; fetch('http://127.0.0.1:{port}/')</script>"
    )
    # The address must come through a pipe while the page runs, with Python's own buffering.
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = started("ui", runs, "--device", "cpu", env=buffered, **pipes)
    address = process.stdout.readline().split()[-1]
    yield runs, address, process
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def _status(address, **headers):
    try:
        with urllib.request.build_opener(_NoRedirect).open(urllib.request.Request(address, headers=headers)) as answer:
            return answer.status, dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


def _upgraded(port, cookie, origin):
    """The status that a socket gets."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        lines = [
            "GET /_nicegui_ws/socket.io/?EIO=4&transport=websocket HTTP/1.1",
            f"Host: 127.0.0.1:{port}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Version: 13",
            f"Origin: {origin}",
            f"Cookie: {cookie}",
            "",
            "",
        ]
        connection.sendall("\r\n".join(lines).encode())
        return int(connection.recv(200).split()[1])


def test_only_the_printed_address_of_this_machine_is_answered(served):
    _, address, _ = served
    place, token = address.split("/?token=")
    port = int(place.rpartition(":")[2])
    code, headers = _status(address)
    cookie = headers["set-cookie"].split(";")[0]
    assert code == 303 and "HttpOnly" in headers["set-cookie"] and "SameSite=strict" in headers["set-cookie"]
    assert token not in headers["location"]
    assert _status(place, Cookie=cookie)[0] == 200
    assert _status(place)[0] == 403 and _status(f"{place}/?token=x{token[1:]}")[0] == 403
    assert _status(place, Cookie=cookie, Host="evil.example")[0] == 403
    assert _status(place, Cookie=cookie, Origin="http://evil.example")[0] == 403
    assert _status(f"{place}/report/first")[0] == 403 and _status(f"{place}/_nicegui/")[0] == 403
    assert _upgraded(port, cookie, place) == 101
    assert _upgraded(port, cookie, "http://evil.example") == 403 and _upgraded(port, "", place) == 403
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if line.split()[3] == "0A"]
    assert f"0100007F:{port:04X}" in listening and f"00000000:{port:04X}" not in listening


def test_every_page_is_accessible_and_asks_nobody_else(served):
    _, address, _ = served
    place = address.split("/?")[0]
    with opened(address) as seen:
        page = seen.page
        for path in (
            "/",
            "/run/first",
            "/chat/first",
            "/audit/first",
            "/compare?runs=first",
            "/run/nothing",
            "/watch/nothing",
            "/run/first?page=x",
        ):
            page.goto(place + path)
            page.get_by_role("heading", level=1).wait_for()
            page.wait_for_timeout(500)
            assert seen.faults() == [], path
        assert seen.logs == [] and all(request.startswith((place, "data:")) for request in seen.requests)


def test_runs_are_listed_filtered_and_compared(served):
    _, address, _ = served
    with opened(address) as seen:
        page = seen.page
        page.get_by_role("link", name="first").wait_for()
        assert page.locator("tbody tr").count() == 2
        page.get_by_label("Filter").fill("other")
        page.get_by_role("link", name="first").wait_for(state="detached")
        page.get_by_label("Filter").fill("")
        page.get_by_role("button", name="Compare").click()
        page.get_by_text("Select two or more").wait_for()
        page.get_by_label("Select all runs").click()
        page.get_by_role("button", name="Compare").click()
        page.get_by_role("heading", name="Compare").wait_for()
        shown = page.locator("tbody").text_content()
        assert all(name in shown for name in ("base", "reference", "first", "other <i>"))


def test_a_card_is_read_and_a_hostile_one_does_nothing(served, elsewhere):
    _, address, _ = served
    place = address.split("/?")[0]
    with opened(address) as seen:
        page = seen.page
        page.goto(f"{place}/run/first")
        page.get_by_role("heading", name="What the edit did").wait_for()
        page.goto(f"{place}/run/{quote('other <i>')}")
        page.get_by_text("<script>window.hacked=1</script>").wait_for()
        assert page.get_by_role("img", name="picture").count() == 1
        assert page.evaluate("window.hacked") is None and page.locator("a[href^=javascript]").count() == 0
        # A report of somebody else's may run, but in a world of its own.
        page.goto(f"{place}/report/{quote('other <i>')}")
        assert page.evaluate("window.ran") == 1 and page.evaluate("window.origin") == "null"
        with pytest.raises(Exception, match="cookie"):
            page.evaluate("document.cookie")
    with pytest.raises(BlockingIOError):
        elsewhere.accept()
    # The trap would have caught it.
    with socket.create_connection(elsewhere.getsockname()):
        elsewhere.accept()[0].close()


def test_both_models_answer_the_same_prompt(served):
    _, address, _ = served
    results = json.loads((served[0] / "first" / "checkpoint" / "excise" / "eval.json").read_text())
    sample = results["samples"][0]
    with opened(address) as seen:
        page = seen.page
        page.goto(f"{address.split('/?')[0]}/chat/first")
        page.get_by_label("Base model").fill(SMALL_TESTBED)
        page.get_by_label("Tokens at most").fill("8")
        page.get_by_label("Prompt").fill(sample["prompt"])
        page.get_by_role("button", name="Send to both").click()
        page.get_by_text("edited", exact=True).wait_for(timeout=600_000)
        shown = page.locator(".q-card").first.text_content()
        assert sample["prompt"] in shown and sample["base"] in shown and sample["edited"] in shown
        page.get_by_label("Base model").fill("builtin:nothing")
        page.get_by_role("button", name="Send to both").click()
        page.get_by_text("no built-in model").wait_for()


def test_an_audit_is_started_watched_and_ended_with_the_page(served):
    runs, address, process = served
    with opened(address) as seen:
        page = seen.page
        page.goto(f"{address.split('/?')[0]}/audit/first")
        page.get_by_label("Base model").fill(SMALL_TESTBED)
        page.get_by_label("Reference model").fill(SMALL_REFERENCE)
        page.get_by_label("Attacks, separated by commas").fill("rtt")
        page.get_by_role("button", name="Start").click()
        page.get_by_role("img", name="Recovery under rtt").wait_for(timeout=600_000)
        assert "rtt" in page.get_by_role("status").text_content()
        assert seen.faults() == [] and seen.logs == []
    assert (runs / "audit-1" / ".work").is_dir()
    process.send_signal(signal.SIGINT)
    process.wait(60)
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(runs / "audit-1") not in running and "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["nowhere"], "is no folder of runs"), ([".", "--port", "TAKEN"], "is taken; give another --port")],
)
def test_a_wrong_request_is_one_line(words, message, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = excise("ui", *(str(taken.getsockname()[1]) if word == "TAKEN" else word for word in words), cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_running_audit_in_several_processes_shows_the_curves_of_all(tmp_path):
    parts = tmp_path / ".work" / "parts"
    parts.mkdir(parents=True)
    for number, subject in enumerate(("base", "edited")):
        event = {"time": 2.0 - number, "stage": f"attack {subject}: rtt", "step": 1, "metrics": {"at": 4, "rtt": 0.5}}
        (parts / f"worker-{number}.jsonl").write_text(json.dumps(event) + "\n")
    assert audits.recovery(audits._events(tmp_path)) == {"rtt": {"base": [(4, 0.5)], "edited": [(4, 0.5)]}}
    assert [event["time"] for event in audits._events(tmp_path)] == [1.0, 2.0]
    # Once the audit has ended, one file tells it all.
    shutil.rmtree(parts)
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
    assert audits.recovery(audits._events(tmp_path)) == {"rtt": {"edited": [(4, 0.5)]}}
