"""Pages in a real browser: they ask nobody for anything, show texts as texts, and can be read by everybody."""

import dataclasses
import json
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import pytest
from browser import opened
from excise.artifacts.checkpoints.manifest import verify_folder
from excise.artifacts.events import Events
from excise.artifacts.reporting.directions_page import write_report as write_directions
from excise.artifacts.reporting.report import report_of, write_report
from excise.eval.measurements import BY_LAYER
from excise.recipes.audit import recipe as audit
from excise.recipes.audit.attacks import table as attacks
from helpers import PRIVATE, SMALL_REFERENCE, SMALL_TESTBED, excise, run_on_knowledge

HOSTILE = '</script><script>window.hacked=1</script><img src="http://127.0.0.1:9/x" onerror="window.hacked=1">\u202e|`'
LONG = HOSTILE + "A" * 1_000_000


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on knowledge, beside the twin that never knew it, with its audit."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    results = run_on_knowledge(out)
    # What a run writes, and what its checkpoint alone gives, before there is an audit.
    shutil.copyfile(out / "report.html", out / "first.html")
    report_of(out / "checkpoint", out / "alone.html")
    patch = pytest.MonkeyPatch()
    for name, value in PRIVATE.items():
        patch.setenv(name, value)
    short = dataclasses.replace(
        attacks.BUDGETS["quick"], attacks=("int4", "rtt"), steps=4, seeds=1, others=8, formats=8
    )
    patch.setitem(attacks.BUDGETS, "quick", short)
    settings = audit.AuditSettings(
        model=str(out / "checkpoint"),
        base=SMALL_TESTBED,
        reference=SMALL_REFERENCE,
        questions=20,
        card=True,
        out=out / "audit",
    )
    audit.run(audit.prepare(settings), Events())
    patch.undo()
    return out, results


def _results(out):
    folder = out / "checkpoint"
    return [json.loads((folder / "excise" / name).read_text()) for name in ("eval.json", "manifest.json", "audit.json")]


def test_knowledge_is_measured_beside_the_twin_that_never_knew_it(run):
    out, results = run
    values = {(m["name"], m["split"], m["subject"]): m["value"] for m in results["measurements"]}
    for split in ("forget_T", "forget_V", "neighbour", "retain"):
        for subject in ("base", "edited", "reference"):
            assert 0 <= values["multiple_choice", split, subject] <= 1
    assert values["multiple_choice", "forget_V", "reference"] < 0.3
    assert "reference" in (out / "checkpoint" / "README.md").read_text()


@pytest.mark.parametrize(("width", "dark"), [(1240, False), (1240, True), (390, False)])
def test_the_report_asks_for_nothing_fits_its_window_and_is_accessible(run, width, dark):
    out, _ = run
    with opened(out / "report.html", width=width, dark=dark) as seen:
        assert seen.requests == [f"file://{out / 'report.html'}"] and seen.logs == []
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
        assert seen.faults() == []
        titles = seen.page.locator("h2").all_text_contents()
        assert {"Measurements", "Linear probes by layer", "How the direction was chosen", "Does it hold?"} <= set(
            titles
        )
        # Probes, and the one attack that trains.
        assert seen.page.locator("figure svg[role=img]").count() == 2


@pytest.mark.parametrize("width", [1280, 420])
def test_what_matters_of_a_measurement_is_seen_without_scrolling(run, width):
    out, results = run
    with opened(out / "report.html", width=width) as seen:
        rows = seen.page.locator(".measured tbody tr")
        assert rows.count() == len({(m["name"], m["split"]) for m in results["measurements"] if m["name"] != BY_LAYER})
        # Name, base, edited and their difference of every row lie inside the window and the box that could scroll.
        outside = """() => [...document.querySelectorAll('.measured tbody tr')].flatMap(row => {
            const box = row.closest('.scroll').getBoundingClientRect();
            const shown = [row.cells[0], ...['base', 'edited', 'edited − base'].map(
                name => row.querySelector(`td[data-of="${name}"]`))].filter(cell => cell.textContent.trim());
            return shown.filter(cell => {
                const place = cell.getBoundingClientRect();
                const right = Math.min(box.right, innerWidth) + 1;
                return !place.width || place.right > right || cell.scrollWidth > cell.clientWidth + 1;
            }).map(cell => cell.textContent)})"""
        assert seen.page.evaluate(outside) == []
        named = "getComputedStyle(document.querySelector('.measured td[data-of=base]'), '::before').content"
        # On a narrow window every value is named beside it, because the heading is gone.
        assert ("base" in seen.page.evaluate(named)) == (width == 420)
        assert seen.page.locator(".measured .whiskers").first.is_visible() == (width == 1280)


def test_axe_would_find_a_fault(run, tmp_path):
    out, _ = run
    page = (out / "report.html").read_text().replace('lang="en"', "").replace("--faint: #5b6570", "--faint: #ddd")
    (tmp_path / "bad.html").write_text(page)
    with opened(tmp_path / "bad.html") as seen:
        assert {"html-has-lang", "color-contrast"} <= {rule for rule, _ in seen.faults()}


def test_replies_are_searched_and_filtered_and_settings_copied(run):
    out, results = run
    total = len(results["samples"])
    word = results["samples"][0]["prompt"].split()[-1]
    hits = sum(
        word.lower() in f"{s['split']} {s['prompt']} {s['base']} {s['edited']}".lower() for s in results["samples"]
    )
    assert 0 < hits < total
    with opened(out / "report.html", permissions=["clipboard-read", "clipboard-write"]) as seen:
        page = seen.page
        shown = page.locator(".pair:visible")
        assert shown.count() == total
        page.get_by_label("Search").fill(word)
        assert shown.count() == hits and page.get_by_role("status").text_content() == f"{hits} of {total} shown"
        page.get_by_label("Search").fill("")
        page.get_by_label("Split").select_option("neutral")
        assert shown.count() == sum(s["split"] == "neutral" for s in results["samples"])
        page.get_by_label("Split").select_option("")
        page.get_by_label("only replies that differ").check()
        assert shown.count() == sum(s["base"] != s["edited"] for s in results["samples"])
        page.locator("[data-copies=command]").click()
        page.get_by_role("button", name="Copied").wait_for()
        assert page.evaluate("navigator.clipboard.readText()") == results["run"]["command"]


def test_on_paper_no_table_is_cut_off_and_nothing_asks_for_a_click(run):
    """An A4 page is 794 pixels wide; printed pages have margins of their own."""
    out, _ = run
    wide = "[...document.querySelectorAll('table')].filter(t => t.getBoundingClientRect().right > innerWidth).length"
    with opened(out / "report.html", width=720) as seen:
        # On a screen the same tables are wider and scroll.
        assert seen.page.evaluate(wide) > 0 and seen.page.get_by_label("Search").is_visible()
        seen.page.emulate_media(media="print")
        assert seen.page.evaluate(wide) == 0 and not seen.page.get_by_label("Search").is_visible()
        assert seen.page.evaluate("document.querySelector('.scroll table').innerText").count("[") > 20


def test_hostile_texts_do_nothing_on_any_page(run, tmp_path):
    out, _ = run
    results, manifest, audited = _results(out)
    results["samples"][0] |= {"prompt": HOSTILE, "edited": LONG, "base": HOSTILE}
    results["concept"]["description"] = HOSTILE
    audited["reasons"] = [HOSTILE]
    write_report(tmp_path / "report.html", results, manifest["tensors_changed"], audited)
    context = {"before": LONG, "token": HOSTILE, "after": "", "projection": 1.0}
    one = {
        "place": "p",
        "index": 0,
        "name": HOSTILE,
        "score": 1.0,
        "top_tokens": [HOSTILE],
        "bottom_tokens": [],
        "top": [context],
        "bottom": [],
        "mean": 0.0,
        "deviation": 1.0,
        "effect": 0.0,
    }
    write_directions(
        tmp_path / "inspect.html", {"model": {"name": HOSTILE}, "texts": 1, "left_out": 0, "directions": [one]}
    )
    for name in ("report.html", "inspect.html"):
        with opened(tmp_path / name) as seen:
            assert seen.page.evaluate("window.hacked") is None and seen.logs == []
            assert len(seen.requests) == 1
            shown = seen.page.locator("body").text_content()
            assert "window.hacked=1" in shown and "\u202e" not in shown and "more characters" in shown
            assert seen.page.evaluate("document.documentElement.scrollWidth") <= 1240


def test_a_report_of_two_hundred_long_replies_stays_small(run, tmp_path):
    out, _ = run
    results, manifest, audited = _results(out)
    results["samples"] = [{"split": "concept", "prompt": "p" * 500, "base": "é" * 3000, "edited": "e" * 3000}] * 200
    write_report(tmp_path / "report.html", results, manifest["tensors_changed"], audited)
    assert (tmp_path / "report.html").stat().st_size < 1.5e6


def test_the_audit_has_its_own_page_and_its_curve_stands_on_the_card(run):
    out, _ = run
    with opened(out / "audit" / "report.html") as seen:
        assert seen.faults() == [] and seen.logs == [] and len(seen.requests) == 1
    folder = out / "checkpoint"
    card = (folder / "README.md").read_text()
    assert "](excise/recovery.png)" in card and "were not tested" not in card
    assert (folder / "excise" / "recovery.png").read_bytes() == (out / "audit" / "recovery.png").read_bytes()
    assert (folder / "excise" / "recovery.png").read_bytes()[:4] == b"\x89PNG" and verify_folder(folder) > 10


def test_nothing_written_names_this_machine_its_user_or_a_token(run):
    out, _ = run
    machine = [
        str(Path.home()),
        f"{tempfile.gettempdir()}/",
        str(Path.cwd()),
        str(out),
        socket.gethostname(),
        sys.prefix,
    ]
    # A short name could stand in any bytes by chance.
    private = [text.encode() for text in (*PRIVATE.values(), *machine) if len(text) > 4]
    paths = [path for path in out.rglob("*") if path.is_file()]
    names = {path.name for path in paths}
    assert {"README.md", "eval.json", "manifest.json", "audit.json", "report.html", "recovery.png"} <= names
    for path in paths:
        content = path.read_bytes()
        assert not [text for text in private if text in content], path


def test_a_checkpoint_alone_gives_the_same_report(run, tmp_path):
    out, _ = run
    assert (out / "alone.html").read_bytes() == (out / "first.html").read_bytes() != (out / "report.html").read_bytes()
    done = excise("report", out / "checkpoint", "--out", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").read_bytes() == (out / "report.html").read_bytes()
    taken = excise("report", out, "--out", tmp_path / "page.html")
    assert taken.returncode == 2 and "exists" in taken.stderr
    assert excise("report", tmp_path, "--out", tmp_path / "none.html").returncode == 2
