"""Pages that list runs, show a card, compare runs and chat with models."""

import base64
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ...artifacts.checkpoints.manifest import FOLDER
from ...artifacts.models.find import find_model
from ...artifacts.models.load import choose_device, choose_dtype, load_model
from ...artifacts.reporting.audit_page import PICTURE, headline_of
from ...artifacts.reporting.card import CARD, body
from ...artifacts.reporting.results import format_value
from ...artifacts.runs import Run
from ...editing.errors import ExciseError
from ...eval.inference.generation import generate
from ..compare import Line, table_of
from .frame import Workbench, base_of, frame, say

TOKENS = 200
"""Largest number of tokens in a reply."""


def index_page(bench: Workbench) -> None:
    from nicegui import ui

    columns = [
        {"name": key, "label": label, "field": key, "align": "left", "sortable": True}
        for key, label in (
            ("name", "run"),
            ("recipe", "recipe"),
            ("model", "model"),
            ("concept", "concept"),
            ("main", "main change, or verdict"),
            ("audit", "audit"),
        )
    ]
    with frame("Runs"):
        runs = bench.runs()
        if not runs:
            say(f"There is no run in {bench.folder.name} yet. Make one: excise run orthogonalize")
            return
        with ui.row().classes("items-center"):
            words = ui.input("Filter").props("clearable outlined dense").classes("w-72")
            compare = ui.button("Compare").props("no-caps")
            told = ui.label("").props('role="status"')
        table = ui.table(
            rows=[_line(run) for run in runs], columns=columns, row_key="name", selection="multiple", pagination=50
        )
        table.classes("w-full").bind_filter_from(words, "value")
        # The library's checkboxes have no labels for screen readers.
        table.add_slot("header-selection", '<q-checkbox v-model="props.selected" aria-label="Select all runs" />')
        table.add_slot(
            "body-selection", '<q-checkbox v-model="props.selected" :aria-label="`Select ${props.row.name}`" />'
        )
        table.add_slot(
            "body-cell-name",
            '<q-td :props="props"><a class="run-link" :href="props.row.link">{{ props.value }}</a></q-td>',
        )

        def chosen() -> None:
            names = [row["name"] for row in table.selected if row["kind"] == "run"]
            if len(names) < 2:
                told.set_text("Select two or more finished runs first.")
            else:
                ui.navigate.to(f"/compare?runs={quote(','.join(names))}")

        compare.on_click(chosen)


def _line(run: Run) -> dict[str, str]:
    about = run.content
    where = "watch" if run.kind == "audit" else "run"
    return {
        "name": run.name,
        "kind": run.kind if run.state == "finished" else run.state,
        "link": f"/{where}/{quote(run.name)}",
        "recipe": "audit" if run.kind == "audit" else (about.get("run") or {}).get("recipe", ""),
        "model": ((about.get("models") or {}).get("edited") or about.get("base") or {}).get("name", ""),
        "concept": (about.get("concept") or {}).get("name", ""),
        "main": run.main_change if run.state == "finished" else run.state,
        "audit": headline_of(run.audit) if run.audit else "",
    }


def run_page(bench: Workbench, run: Run) -> None:
    from nicegui import ui

    with frame(run.name):
        if run.state != "finished":
            say(f"This run is {run.state}.")
            return
        with ui.row():
            ui.link("Chat with base and edited", f"/chat/{quote(run.name)}")
            ui.link("Audit it", f"/audit/{quote(run.name)}")
            if (run.folder / "report.html").is_file():
                ui.link("Report", f"/report/{quote(run.name)}")
        card = run.checkpoint / CARD
        text = body(card.read_text(encoding="utf-8")) if card.is_file() else "*This checkpoint has no card.*"
        ui.html(_markdown(text, run.checkpoint), sanitize=False).classes("card-text overflow-x-auto w-full")


def _markdown(text: str, folder: Path) -> str:
    """A card as HTML. Tags in the card are shown as text, and its picture is embedded."""
    from markdown_it import MarkdownIt

    shown = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    # The page already has a first-level heading, so the card's headings move down one level.
    # From the deepest up, or a heading would move twice.
    for level in (2, 1):
        shown = shown.replace(f"<h{level}>", f"<h{level + 1}>").replace(f"</h{level}>", f"</h{level + 1}>")
    shown = shown.replace("<pre>", '<pre tabindex="0">').replace("<table>", '<table tabindex="0">')
    picture = folder / FOLDER / PICTURE
    if picture.is_file():
        data = base64.b64encode(picture.read_bytes()).decode()
        shown = shown.replace(f'src="{FOLDER}/{PICTURE}"', f'src="data:image/png;base64,{data}"')
    return shown


def compare_page(bench: Workbench, names: list[str]) -> None:
    from nicegui import ui

    with frame("Compare"):
        runs = [run for run in bench.runs() if run.name in names and run.state == "finished"]
        try:
            lines, shown = table_of([run.folder for run in runs]) if runs else ([], [])
        except ExciseError as error:
            say(str(error))
            return
        columns = [{"name": key, "label": key, "field": key, "align": "left"} for key in ("model", "recipe", *shown)]
        ui.table(rows=[_compared(line, shown) for line in lines], columns=columns, row_key="model").classes("w-full")
        say("Brackets are 95% intervals.")


def _compared(line: Line, shown: list[str]) -> dict[str, str]:
    return {"model": line.name, "recipe": line.recipe, **{name: format_value(line.values.get(name)) for name in shown}}


@lru_cache(maxsize=3)
def _loaded(reference: str, device: str, dtype: str) -> Any:
    chosen = choose_device(device)
    return load_model(find_model(reference), chosen, choose_dtype(dtype, chosen))


def chat_page(bench: Workbench, run: Run) -> None:
    from nicegui import run as background
    from nicegui import ui

    with frame(f"Chat: {run.name}"):
        with ui.row().classes("items-end w-full"):
            base = ui.input("Base model", value=base_of(run)).props("outlined dense").classes("w-72")
            seed = (
                ui.number("Seed (empty: greedy)", value=None, min=0, precision=0)
                .props("outlined dense")
                .classes("w-48")
            )
            tokens = (
                ui.number("Tokens at most", value=60, min=1, max=TOKENS, precision=0)
                .props("outlined dense")
                .classes("w-40")
            )
        prompt = ui.textarea("Prompt").props("outlined autogrow").classes("w-full")
        send = ui.button("Send to both").props("no-caps")
        told = ui.label("").props('role="status"')
        replies = ui.element("div").classes("w-full")

        def answer(reference: str, text: str, count: int, chosen: int | None) -> str:
            loaded = _loaded(reference, bench.device, bench.dtype)
            return generate(loaded.model, loaded.tokenizer, [text], count, sample_seed=chosen)[0].shown

        async def reply() -> None:
            text, chosen = prompt.value.strip(), None if seed.value is None else int(seed.value)
            if not text:
                told.set_text("Write a prompt first.")
                return
            send.disable()
            told.set_text("Thinking…")
            try:
                sides = {}
                for name, reference in (("base", base.value), ("edited", str(run.checkpoint))):
                    # In a thread, so that the page still answers while the models compute.
                    sides[name] = await background.io_bound(answer, reference, text, int(tokens.value or 1), chosen)
            except ExciseError as error:
                told.set_text(str(error))
                return
            finally:
                send.enable()
            told.set_text("")
            with replies:
                with ui.card().classes("w-full") as shown:
                    say(text).classes("font-bold")
                    with ui.element("div").classes("grid grid-cols-1 md:grid-cols-2 gap-4 w-full"):
                        for name, words in sides.items():
                            with ui.element("div"):
                                ui.label(name).classes("text-sm opacity-80")
                                say(words or "(empty)")
                shown.move(target_index=0)

        send.on_click(reply)
