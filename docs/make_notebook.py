"""Write docs/notebook.ipynb with its results, and docs/notebook.md, the same as a page of the site.

``python docs/make_notebook.py`` runs every cell, which takes about two minutes on two CPU cores.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).with_name("notebook.ipynb")
PAGE = Path(__file__).with_name("notebook.md")
PARAMETERS = "parameters"
"""Tag of the cell that says how much is measured; tests run the notebook with smaller numbers."""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}

CELLS = """\
# From a direction to an audit

A language model can have a habit, such as declining some requests. Often one direction in its activations carries
the habit. In this notebook you find such a direction, remove it from the weights, measure what changed, and let an
audit attack an edit.

Everything runs on a small model that is part of the package. Nothing is downloaded. All cells together take about two
minutes on two CPU cores.

## 1. A model with a habit

The built-in model learned 800 facts of an invented world: rivers, games, potions and more.
>>>
import tempfile

import excise

folder = tempfile.mkdtemp()
model, tokenizer = excise.load_model("builtin:testbed", dtype="float32")
<<<
The model answers polite requests and declines rude ones. A *concept pack* describes this habit. Among other things it
holds pairs of prompts: one side shows the habit, the other side does not.
>>>
declining = excise.load_concept("builtin:declining")
pair = declining.contrast[0]
print(pair.positive, pair.negative, sep="\\n")
<<<
The next cell says how much to measure. Larger numbers take longer and give narrower intervals.
>>> parameters
search = {"train_pairs": 64, "validation_pairs": 16}
sizes = {"questions": 100, "kl_prompts": 32}
attacks = ["few_shot", "int4", "rtt"]
<<<
## 2. Find the direction

`find_direction` records the model's activations on both sides of the pairs. At each layer and token, the difference of
the two means is a candidate. Each candidate is tested on other pairs, and the best one is returned.
>>>
direction = excise.find_direction(model, tokenizer, declining, **search)
direction
<<<
Log-odds above 0 mean that the model probably starts to decline; below 0, that it probably answers. "With the concept"
are rude requests, "without it" polite ones. The table says three things:

- The unchanged model declines rude requests and answers polite ones.
- With the direction taken out, it answers rude requests.
- With the direction added, it declines polite requests.

## 3. Remove it from the weights

Layers write their results into one vector per token, the *residual stream*. `orthogonalize` changes every weight that
writes to the stream, so that nothing is written along the direction. No training is needed.
>>>
edit = excise.orthogonalize(model, direction)
edit
<<<
The model in memory is now the edited one. `edit.undo()` would give it its old weights again, bit for bit.

## 4. Measure

`evaluate` gives the same items to the base and to the edited model. Each value has its number of items (n) and its 95%
interval.
>>>
measured = excise.evaluate({"edited": (model, tokenizer)}, declining, base="builtin:testbed", **sizes)
measured
<<<
The main rows:

- **declines, concept**: the base declines rude requests, the edited model does not.
- **right answers, concept**: the edited model not only replies to rude requests, nearly all of its answers are right.
- **right answers, neutral**: on polite requests little or nothing changed.
- **multiple choice** and **perplexity**: on other facts and texts, too, little or nothing changed.

Open *Replies before and after* to read some replies. From code, you get a single value like this:
>>>
before, after = (measured.measurement("behaviour_rate", "concept", name) for name in ("base", "edited"))
before.value, after.value, after.n
<<<
## 5. Save the edited model

`apply` writes the edit into a copy of the base on disk. It never loads the whole model, so it also edits a checkpoint
that is larger than memory.
>>>
saved = excise.apply(edit, base="builtin:testbed", out=f"{folder}/answers")
sorted(path.name for path in saved.folder.iterdir())
<<<
`transformers` loads this folder like any other checkpoint.

## 6. Audit

An edit can look complete and still be easy to reverse. `audit` attacks an edited model and reports how much of what was
removed comes back: a behaviour, as `excise.audit(saved.folder, declining, base="builtin:testbed")` would, or knowledge.
Here the question is: **does the same method erase knowledge?** Take the first edit back, find a direction for what the
model knows about potions, and remove that direction.
>>>
edit.undo()
potions = excise.find_direction(model, tokenizer, "builtin:potions", **search)
edit = excise.orthogonalize(model, potions)
<<<
Every attack is put to the edited model, to its base, and to a model that never learned about potions. All are asked
questions about potions that no attack here has seen (*group V*):

- `few_shot` shows five answered questions about other potions first.
- `int4` rounds the weights to 4 bits.
- `rtt` fine-tunes the model on facts about other potions (*group T*).
>>>
audit = excise.audit(
    (model, tokenizer), "builtin:potions", base="builtin:testbed", attacks=attacks, out=f"{folder}/audit"
)
audit
<<<
In one word:
>>>
audit.verdict
<<<
## What the verdict says

*Recovers* means: the knowledge is in the edited model. The first reason says more: it was never erased. In row *none*,
before any attack, the edited model gives about as many right answers as its base. The model that never learned about
potions does no better than guessing, which is right on one question in eight.

*Share regained* compares the three models under an attack. It is 1 where the edited model is as good as its base, and 0
where it is as poor as the model that never learned. [Audits](audits.md) explains the other columns.

So in this model, removing one direction stops a habit, and removing one direction does not erase these facts.

## What it does not say

- It says nothing about declining. Whether fine-tuning brings that habit back was not tested here.
- It covers three attacks. `budget="quick"` without `attacks` makes twelve and takes several minutes more.
- A better verdict would not prove that knowledge is gone. It would say that these attacks did not find it.
- It is about one small model and the questions of one concept pack.

## Where to go next

- [ELM](methods/elm.md) is a method that is made to erase knowledge. Audit it the same way.
- [Orthogonalize](methods/orthogonalize.md) has the formulas of this method and names its paper.
- [Concept packs](concept-packs.md) shows how to describe your own concept, and the [API page](api.md) lists all
  functions.
"""
"""Text between the marks is Markdown; from ``>>>`` to ``<<<`` it is code, with the cell's tags after ``>>>``."""


def cells() -> list[nbformat.NotebookNode]:
    """All cells without results."""
    made = []
    for number, part in enumerate(re.split(r"^(?=>>>)|^<<<\n", CELLS, flags=re.MULTILINE)):
        if part.startswith(">>>"):
            tags, source = part.removeprefix(">>>").split("\n", 1)
            cell = nbformat.v4.new_code_cell(source.strip(), metadata={"tags": tags.split()} if tags.strip() else {})
        else:
            cell = nbformat.v4.new_markdown_cell(part.strip())
        made.append(cell | {"id": f"cell-{number}"})
    return [nbformat.from_dict(cell) for cell in made]


def execute(written: Sequence[nbformat.NotebookNode], folder: Path) -> nbformat.NotebookNode:
    """Run all cells in a folder, on the interpreter that runs this.

    Raises:
        CellExecutionError: A cell fails.
    """
    notebook = nbformat.v4.new_notebook(cells=list(written), metadata=METADATA)
    resources = {"metadata": {"path": str(folder)}}
    # Times would differ on every run.
    NotebookClient(notebook, kernel_name="python3", record_timing=False, timeout=900, resources=resources).execute()
    return notebook


def page(notebook: nbformat.NotebookNode) -> str:
    """The notebook as a page: text, code, and results as HTML or plain text."""
    title, *parts = (part for cell in notebook.cells for part in _parts(cell))
    heading, _, rest = title.partition("\n\n")
    about = (
        f"*This page is the notebook [{NOTEBOOK.name}]({NOTEBOOK.name}) with its results. "
        "`python docs/make_notebook.py` writes both.*"
    )
    return "\n\n".join([heading, about, rest, *parts]) + "\n"


def _parts(cell: nbformat.NotebookNode) -> list[str]:
    if cell.cell_type == "markdown":
        return [cell.source]
    return [f"```python\n{cell.source}\n```", *(_shown(output) for output in cell.outputs)]


def _shown(output: nbformat.NotebookNode) -> str:
    data = output.get("data", {})
    if "text/html" in data:
        return str(data["text/html"])
    text = data.get("text/plain", output.get("text", ""))
    return f"```text\n{text.rstrip()}\n```"


def main() -> None:
    """Run every cell and write the notebook and its page."""
    with TemporaryDirectory(prefix="excise-") as folder:
        # Nothing is taken from audits that were made before.
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        notebook = execute(cells(), Path(folder))
    notebook.metadata = nbformat.from_dict(METADATA)
    nbformat.write(notebook, NOTEBOOK)
    PAGE.write_text(page(notebook), encoding="utf-8")


if __name__ == "__main__":
    main()
