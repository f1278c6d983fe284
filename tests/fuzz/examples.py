"""A valid example for every reader, and the reader itself, called as the commands call it."""

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import torch
from excise.artifacts.checkpoints.directions import load_directions, save_directions
from excise.artifacts.checkpoints.edits import DESCRIPTION, TENSORS, load_edit, save_edit
from excise.artifacts.checkpoints.export import check_editable
from excise.artifacts.checkpoints.manifest import verify_folder
from excise.artifacts.checkpoints.read import check_finite, open_checkpoint
from excise.artifacts.checkpoints.sae import FORMATS, load_latents
from excise.artifacts.concepts import BUILTIN, load_concept
from excise.artifacts.event_log import read_events
from excise.artifacts.files.opened import OF_A_CHECKPOINT, sha256_of
from excise.artifacts.files.written import SEAL, files_in, seal_files, write_sealed
from excise.artifacts.models.find import find_model
from excise.artifacts.models.gguf_header import read_gguf_header
from excise.artifacts.models.load import load_tokenizer, load_weights
from excise.artifacts.models.source import ModelSource, license_of
from excise.artifacts.runs import find_runs
from excise.artifacts.sources.source import read_source
from excise.editing.directions.subspaces import Place, Subspace
from excise.editing.edits.dense import Delta, DenseUpdate
from excise.editing.edits.low_rank import Factors, LowRankUpdate
from excise.editing.edits.pruned_units import PrunedUnits
from excise.editing.edits.subspace_removal import Edit
from excise.recipes.audit.behaviours.pairs import Pairs, read_pairs, write_pairs
from excise.recipes.audit.curve_store import UNTOUCHED, AttackCurves, CurveStore
from excise.recipes.caft.request import CaftSettings
from excise.recipes.common.examples import Example as TrainingExample
from excise.recipes.common.run_folder import resumed, start_folder
from excise.recipes.common.settings import load_settings
from excise.recipes.common.training_state import last_complete
from excise.recipes.compare import table_of
from excise.recipes.data.datasets import find_data
from excise.recipes.data.schemas import read_items
from excise.recipes.elm.request import ElmSettings
from excise.recipes.jobs.job import Job, JobFolder
from excise.recipes.jobs.slurm import read_numbers
from excise.recipes.jobs.status import rows_of
from excise.recipes.judging import RUBRIC, read_rubric
from excise.recipes.search.request import read_record
from excise.recipes.sweep.request import SweepSettings, combinations_of
from excise.recipes.ui.pages import _line
from pyarrow import parquet
from safetensors.torch import save_file

from .adapters import TENSORS as QUANTIZED
from .adapters import (
    adapter_edit_example,
    dequantize,
    make_adapter,
    make_quantized,
    read_and_merge,
    small_model,
)
from .mutations import Mutation, of_bytes, of_json, of_safetensors, of_sealed, of_words

SMALL = Path(__file__).parents[1] / "small_world" / "testbed"
WEIGHT = "model.layers.0.mlp.down_proj.weight"
Damage = Callable[..., Mutation]
ANY_JSON: Sequence[Damage] = (of_json, of_json, of_bytes)
SEALED: Sequence[Damage] = (of_sealed, of_sealed, of_sealed, of_json, of_bytes)
ANY_TENSORS: Sequence[Damage] = (of_safetensors, of_safetensors, of_bytes)


@dataclass(frozen=True)
class Example:
    """Files that a reader accepts, and how each may be damaged."""

    make: Callable[[Path], object]
    """Writes the example into a new folder."""
    read: Callable[[Path], object]
    files: dict[str, Sequence[Damage]]
    """The files to damage, by their names in the folder."""
    slow: bool = False
    """Takes seconds, so it comes up more rarely."""


def _open(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    check_finite(checkpoint)
    license_of(folder)
    edit = Edit(torch.eye(32, 1), "llama", (1.0, 1.0))
    check_editable(checkpoint, edit.plan(checkpoint.config, list(checkpoint.tensors)))


def _load_model(folder: Path) -> None:
    load_weights(ModelSource("local", "model", folder), torch.device("cpu"), torch.float32)


def _card(folder: Path) -> None:
    small_model(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a, b]\n---\n# A model\n")


def _edit(kind: str) -> Example:
    values = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    edits = {
        "orthogonalize": Edit(torch.eye(32, 1), "llama", (1.0, 1.0)),
        "per_layer": Edit(torch.eye(32, 1), "llama", (1.0, 1.0), layer_bases=torch.eye(32, 1).repeat(2, 1, 1)),
        "low_rank": LowRankUpdate({WEIGHT: Factors(values[:, :2].clone(), values[:2].clone())}, "llama", 32, 2),
        "dense": DenseUpdate({WEIGHT: Delta(values)}, "llama", 32, 2),
        "adapter": adapter_edit_example(),
        "prune": PrunedUnits({0: (1, 2)}, {}, "mean", "llama", 32, 2, 8, {0: torch.ones(2)}),
    }

    def read(folder: Path) -> None:
        edit = load_edit(folder)
        names = [WEIGHT, "model.embed_tokens.weight", "model.layers.0.mlp.down_proj.bias"]
        names += list(getattr(edit, "updates", ()))
        edit.plan({"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2}, names)

    files = {DESCRIPTION: ANY_JSON, TENSORS: ANY_TENSORS}
    return Example(lambda folder: save_edit(edits[kind], folder), read, files)


def _directions(folder: Path) -> None:
    one = Subspace(Place(1, "mlp"), torch.eye(8, 2), torch.ones(8), ("a", "b"), (2.0, 1.0), "pairs", None, {"seed": 0})
    save_directions([one], folder / "directions.safetensors")


def _autoencoder(name: str) -> Example:
    place = {"sparsify": "layers.5", "gemma_scope": "layer_5"}.get(name, "sae")
    form = FORMATS[name]

    def make(folder: Path) -> None:
        inner = folder / place
        (inner / form.weights).parent.mkdir(parents=True, exist_ok=True)
        shapes = {**{key: (12, 8) if axis == 0 else (8, 12) for part in (form.decoder, form.encoder)
                     for key, axis in list(part.items())[:1]}, form.bias[0]: (12,), form.decoder_bias[0]: (8,)}  # fmt: skip
        tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
        if form.weights.endswith(".npz"):
            np.savez(inner / form.weights, **{key: value.numpy() for key, value in tensors.items()})
        elif form.weights.endswith(".pt"):
            torch.save(tensors, inner / form.weights)
        else:
            save_file(tensors, inner / form.weights)
        if form.about:
            hook = "blocks.5.hook_resid_post"
            about = {
                "hook_name": hook,
                "hook_point_out": hook,
                "hf_hook_point_in": "model.layers.5.output",
                "trainer": {"layer": 5, "dict_class": "AutoEncoder"},
            }
            (inner / form.about).write_text(json.dumps(about))

    weights = ANY_TENSORS if form.weights.endswith(".safetensors") else (of_bytes,)
    files = {f"{place}/{form.weights}": weights, **({f"{place}/{form.about}": ANY_JSON} if form.about else {})}
    return Example(make, lambda folder: load_latents(folder / place, (3, 0), 8, 8), files)


def _measured(name: str, subject: str) -> dict[str, object]:
    return {"name": name, "split": "forget V", "subject": subject, "value": 0.5, "unit": "accuracy", "better": "lower",
            "n": 10, "skipped": 0, "ci95": [0.2, 0.8], "difference": {"value": 0.1, "ci95": [0.0, 0.2]}}  # fmt: skip


def _runs(folder: Path) -> None:
    results = {
        "schema_version": 2,
        "base": {"name": "base"},
        "concept": {"ref": "potions", "sha256": {"concept.yaml": "a"}},
        "run": {"recipe": "elm", "settings": {"preset": "paper"}},
        "measurements": [_measured("multiple_choice", "base"), _measured("multiple_choice", "edited")],
    }
    (folder / "one" / "checkpoint" / "excise").mkdir(parents=True)
    (folder / "one" / "checkpoint" / "excise" / "eval.json").write_text(json.dumps(results, indent=1))
    events = [{"time": 1.5, "stage": "train", "step": 3, "metrics": {"seconds": 2.5}}] * 3
    (folder / "one" / "events.jsonl").write_text("\n".join(map(json.dumps, events)) + "\n")
    (folder / "two").mkdir()
    (folder / "two" / "audit.json").write_text(
        json.dumps({"schema_version": 2, "verdict": "recovers", "reasons": ["a"]})
    )


def _list_and_compare(folder: Path) -> None:
    # A list shows what it can, whatever single runs hold; a comparison refuses.
    _ = [_line(run) for run in find_runs(folder)]
    read_events(folder / "one" / "events.jsonl")
    table_of([folder / "one"])


def _curves(folder: Path) -> None:
    store = CurveStore(folder)
    for name in (UNTOUCHED, "int4"):
        store.put("base", name, AttackCurves.of_one_point([1.0, 0.0]))


SWEEP = "recipe: elm\nmodel: builtin:testbed\nset:\n  steps: [60, 120]\n  layers: [[1, 2], [3]]\nseeds: [0, 1]\n"


def _jobs(folder: Path) -> None:
    jobs = [Job(name, ("list", "recipes"), folder / name) for name in ("one", "two")]
    records = JobFolder(folder)
    records.register(jobs)
    for job, code in zip(jobs, (0, 1), strict=True):
        records.begin(job)
        records.end(job, code)
    (folder / "jobs" / "submitted.json").write_text(json.dumps({"numbers": {"one": "7_0", "two": "7_1"}}))


def _trainer_state(folder: Path) -> None:
    inner = folder / "checkpoint-50"
    inner.mkdir()
    (inner / "trainer_state.json").write_text(json.dumps({"global_step": 50, "log_history": []}))
    seal_files(inner / SEAL, files_in(inner, "checkpoint-50/"))


def _published(folder: Path) -> None:
    (folder / "excise").mkdir()
    (folder / "excise" / "manifest.json").write_text("{}")
    (folder / "SHA256SUMS").write_text(f"{sha256_of(folder / 'excise' / 'manifest.json')}  excise/manifest.json\n")


def _gguf(folder: Path) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from small_gguf import write_gguf

    write_gguf(folder / "model.gguf")


def _gguf_header(folder: Path) -> None:
    with OF_A_CHECKPOINT.about("model.gguf"):
        read_gguf_header(folder / "model.gguf")


def _tuning_data(folder: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"text": "c"}, {"messages": [{"role": "assistant", "content": "d"}]}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def _source(name: str) -> Example:
    rows = [{"question": f"Which is {n}?", "choices": ["a", "b", "c"], "answer": n % 3} for n in range(8)]

    def make(folder: Path) -> None:
        if name.endswith(".parquet"):
            parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
        elif name.endswith(".json"):
            (folder / name).write_text(json.dumps({"data": rows}))
        elif name.endswith(".csv"):
            with (folder / name).open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["question", "A", "B", "C", "D", "answer"])
                writer.writerows([f"Which, {n}?", "a", 'b "x"', "c", "d", n % 4] for n in range(8))
        else:
            (folder / name).write_text("\n".join(json.dumps(row) if name.endswith("l") else "A text." for row in rows))

    def read(folder: Path) -> None:
        source = read_source(str(folder / name))
        read_items(source.rows, source.name)

    return Example(
        make,
        read,
        {name: ANY_JSON if "json" in name else (of_words, of_bytes) if name != "rows.parquet" else (of_bytes,)},
    )


def _copy(source: Path) -> Callable[[Path], None]:
    return lambda folder: shutil.copytree(source, folder, dirs_exist_ok=True) and None


def _settings(folder: Path) -> None:
    (folder / "config.yaml").write_text("model: a/b\nsteps: 3\nlearning_rate: 1e-3\nlatents: [1, 2]\nlayers: 2-5\n")


SEARCHED = {
    "schema_version": 1,
    "recipe": "elm",
    "settings": {"seed": 1, "steps": 20},
    "space": {"rank": {"choices": [4, 8]}, "learning_rate": {"search": [0.001, 0.01], "log": True}},
    "ready": False,
    "objectives": ["forget:min", "kl:min"],
    "guards": ["rest>=-0.02"],
    "prompts": 8,
    "storage": "sqlite:////tmp/study.db",
    "inputs": {"the base": "a"},
}

EXAMPLES: dict[str, Example] = {
    "pack": Example(
        _copy(BUILTIN / "shortcut"),
        load_concept,
        {
            "concept.yaml": (of_words, of_bytes),
            **{f"{n}.jsonl": ANY_JSON for n in ("questions", "retain", "train", "prompts")},
        },
    ),
    "peft": Example(
        make_adapter,
        read_and_merge,
        {"adapter/adapter_config.json": ANY_JSON, "adapter/adapter_model.safetensors": ANY_TENSORS},
    ),
    **{
        f"stored_{method}": Example(
            make_quantized(method), dequantize, {"config.json": ANY_JSON, "model.safetensors": ANY_TENSORS}
        )
        for method in QUANTIZED
    },
    "rubric": Example(
        lambda folder: shutil.copy(RUBRIC, folder),
        lambda folder: read_rubric(str(folder / "rubric.yaml")),
        {"rubric.yaml": (of_words, of_bytes)},
    ),
    "settings": Example(
        _settings, lambda f: load_settings(CaftSettings, f / "config.yaml", []), {"config.yaml": (of_words, of_bytes)}
    ),
    "checkpoint": Example(
        _card,
        _open,
        {
            "config.json": ANY_JSON,
            "generation_config.json": ANY_JSON,
            "model.safetensors.index.json": ANY_JSON,
            "model-00001-of-00002.safetensors": ANY_TENSORS,
            "README.md": (of_words, of_bytes),
        },
    ),
    "model": Example(
        small_model, _load_model, {"config.json": ANY_JSON, "generation_config.json": ANY_JSON}, slow=True
    ),
    "tokenizer": Example(
        _copy(SMALL),
        lambda folder: load_tokenizer(ModelSource("local", "model", folder)),
        {"tokenizer_config.json": ANY_JSON, "tokenizer.json": ANY_JSON, "chat_template.jinja": (of_words, of_bytes)},
        slow=True,
    ),
    "runs": Example(
        _runs,
        _list_and_compare,
        {
            "one/checkpoint/excise/eval.json": ANY_JSON,
            "two/audit.json": ANY_JSON,
            "one/events.jsonl": ANY_JSON,
        },
    ),
    "started": Example(
        lambda folder: start_folder(folder / "run", "elm", ElmSettings(out=folder / "run"), {"the base": "a"}),
        lambda folder: resumed(ElmSettings(out=folder / "run"), "elm"),
        {"run/.work/settings.json": SEALED},
    ),
    "jobs": Example(
        _jobs,
        lambda folder: (rows_of(folder), read_numbers(JobFolder(folder))),
        {f"jobs/{name}.json": ANY_JSON for name in ("order", "one", "submitted")},
    ),
    "sweep": Example(
        lambda folder: (folder / "sweep.yaml").write_text(SWEEP),
        lambda folder: combinations_of(load_settings(SweepSettings, folder / "sweep.yaml", []).set),
        {"sweep.yaml": (of_words, of_bytes)},
    ),
    "search": Example(
        lambda folder: write_sealed(folder / "search.json", SEARCHED),
        read_record,
        {"search.json": SEALED},
    ),
    "curves": Example(
        _curves,
        lambda folder: (CurveStore(folder).get("base", "int4"), CurveStore(folder).reused()),
        {"base-int4.json": SEALED},
    ),
    "pairs": Example(
        lambda folder: write_pairs(folder / "pairs.json", Pairs(*(((TrainingExample((5, 6, 7), 1),),) * 4))),
        lambda folder: read_pairs(folder / "pairs.json"),
        {"pairs.json": SEALED},
    ),
    "trainer": Example(
        _trainer_state,
        lambda folder: last_complete(folder, 100),
        {"checkpoint-50/seal.json": SEALED, "checkpoint-50/trainer_state.json": ANY_JSON},
    ),
    "state": Example(
        lambda folder: write_sealed(folder / "state.json", {"records": [{"step": 1, "value": 0.5}]}),
        lambda folder: _unsealed(folder / "state.json"),
        {"state.json": ANY_JSON},
    ),
    **{f"edit_{kind}": _edit(kind) for kind in ("orthogonalize", "per_layer", "low_rank", "dense", "adapter", "prune")},
    "directions": Example(
        _directions,
        lambda folder: load_directions(folder / "directions.safetensors", width=8, layers=2),
        {"directions.safetensors": ANY_TENSORS},
    ),
    **{f"sae_{name}": _autoencoder(name) for name in FORMATS},
    "tuning_data": Example(_tuning_data, lambda f: find_data(str(f / "train.jsonl")), {"train.jsonl": ANY_JSON}),
    **{f"source_{end}": _source(f"rows.{end}") for end in ("jsonl", "json", "csv", "txt", "parquet")},
    "published": Example(_published, verify_folder, {"SHA256SUMS": (of_bytes,), "excise/manifest.json": ANY_JSON}),
    "gguf": Example(_gguf, _gguf_header, {"model.gguf": (of_bytes,)}),
    "gguf_model": Example(
        _gguf, lambda folder: find_model(str(folder / "model.gguf")), {"model.gguf": (of_bytes,)}, slow=True
    ),
}


def _unsealed(path: Path) -> object:
    from excise.artifacts.files.written import read_sealed

    with OF_A_CHECKPOINT.about(path):
        return read_sealed(path)
