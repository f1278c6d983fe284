"""Edits that are not what a run wrote: none is applied, and none is written."""

import json
from dataclasses import replace

import pytest
import torch
from excise.artifacts.checkpoints.edits import DESCRIPTION, TENSORS, load_edit, save_edit
from excise.artifacts.checkpoints.export import export_edit
from excise.editing.edits.base import edit_model
from excise.editing.edits.dense import Delta, DenseUpdate
from excise.editing.edits.low_rank import Factors, LowRankUpdate
from excise.editing.edits.pruned_units import PrunedUnits
from excise.editing.errors import EditError, ExciseError, RequestError
from excise.recipes import apply
from helpers import make_pico, random_edit
from safetensors.torch import load_file, save_file

WEIGHT = "model.layers.0.mlp.down_proj.weight"


def _low_rank(left=(32, 2), right=(2, 48)):
    generator = torch.Generator().manual_seed(0)
    pair = Factors(torch.randn(left, generator=generator), torch.randn(right, generator=generator))
    return LowRankUpdate({WEIGHT: pair}, "llama", 32, 2)


def _edits():
    values = torch.randn(32, 48, generator=torch.Generator().manual_seed(1))
    return {
        "orthogonalize": random_edit(make_pico("llama").config.to_dict()),
        "low_rank": _low_rank(),
        "dense": DenseUpdate({WEIGHT: Delta(values)}, "llama", 32, 2),
        "prune": PrunedUnits({0: (1, 2)}, {1: (0,)}, "down", "llama", 32, 2, 8),
        "mean": PrunedUnits({0: (1, 2)}, {}, "mean", "llama", 32, 2, 8, {0: torch.ones(2)}),
    }


@pytest.mark.parametrize("name", _edits())
def test_an_edit_survives_its_way_over_the_disk(tmp_path, name):
    edit = _edits()[name]
    save_edit(edit, tmp_path)
    assert str(load_edit(tmp_path)) == str(edit)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["orthogonalize", "low_rank", "dense", "mean"])
def test_an_edit_that_is_not_finite_is_neither_written_nor_read(tmp_path, name, value):
    save_edit(_edits()[name], tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    place = max(key for key, tensor in tensors.items() if tensor.is_floating_point())
    tensors[place].view(-1)[0] = value
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(RequestError, match=f"tensor {place} holds NaN or infinite"):
        load_edit(tmp_path)
    if name == "low_rank":
        broken = LowRankUpdate({WEIGHT: Factors(torch.full((32, 1), value), torch.ones(1, 48))}, "llama", 32, 2)
        with pytest.raises(EditError, match="holds NaN or infinite"):
            save_edit(broken, tmp_path / "written")
        assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("kind", ["in memory", "on disk"])
def test_an_edit_that_overflows_the_stored_type_is_refused(tmp_path, save_pico, kind):
    large = LowRankUpdate({WEIGHT: Factors(torch.full((32, 1), 1e3), torch.full((1, 48), 1e3))}, "llama", 32, 2)
    small = LowRankUpdate({WEIGHT: Factors(torch.full((32, 1), 1e-1), torch.full((1, 48), 1e-1))}, "llama", 32, 2)
    model = make_pico("llama", torch.float16)
    checkpoint = save_pico("llama", torch.float16)
    for edit, refused in ((small, False), (large, True)):
        folder = tmp_path / str(refused)
        folder.mkdir()
        try:
            if kind == "in memory":
                edit_model(edit, model, model.config.to_dict())
            else:
                export_edit(edit, checkpoint, folder)
        except EditError as error:
            assert refused and f"{WEIGHT} NaN or infinite" in str(error)
        else:
            assert not refused


@pytest.mark.parametrize(
    "edit, told",
    [
        (_low_rank((32, 2), (2, 47)), "has 48 columns, but the update has 47"),
        (_low_rank((31, 2), (2, 48)), "has 32 rows, but the update has 31"),
        (DenseUpdate({WEIGHT: Delta(torch.ones(32, 1))}, "llama", 32, 2), "has 48 columns, but the update has 1"),
        (PrunedUnits({0: (48,)}, {}, "down", "llama", 32, 2, 8), "has 48 units, the edit names unit 48"),
        (PrunedUnits({0: (-1,)}, {}, "down", "llama", 32, 2, 8), "has 48 units, the edit names unit -1"),
    ],
)
def test_factors_and_units_of_another_shape_are_refused_before_a_weight_is_read(tmp_path, save_pico, edit, told):
    folder = save_pico("llama").folder
    with pytest.raises(RequestError, match=told):
        apply.prepare(edit, str(folder), tmp_path / "out")
    # Also where nobody looked before: in memory, and in the export itself.
    model = make_pico("llama")
    with pytest.raises(RequestError, match=told):
        edit_model(edit, model, model.config.to_dict())
    assert apply.prepare(_low_rank(), str(folder), tmp_path / "out").plan.declared == (WEIGHT,)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"layer_strengths": [1.0, "x"]}, "layer_strengths.1: input should be a valid number, got 'x'"),
        ({"variant": "plane"}, "variant: input should be 'plain'"),
        ({"provenance": []}, "provenance: input should be a valid dictionary"),
        ({"schema_version": 9}, "edit of version 9"),
        ({"method": ["orthogonalize"]}, "method: input should be a valid string"),
    ],
)
def test_a_description_of_another_form_names_the_field(tmp_path, change, told):
    save_edit(_edits()["orthogonalize"], tmp_path)
    content = json.loads((tmp_path / DESCRIPTION).read_text())
    (tmp_path / DESCRIPTION).write_text(json.dumps({**content, **change}))
    with pytest.raises(RequestError, match=told) as caught:
        load_edit(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", _edits())
def test_tensors_that_are_cut_of_another_name_or_kind_are_refused(tmp_path, name):
    save_edit(_edits()[name], tmp_path)
    whole = (tmp_path / TENSORS).read_bytes()
    tensors = load_file(tmp_path / TENSORS)
    first = min(tensors)
    (tmp_path / TENSORS).write_bytes(whole[:-7])
    with pytest.raises(RequestError, match="not a whole safetensors file"):
        load_edit(tmp_path)
    for changed in (
        {("x" if key == first else key): value for key, value in tensors.items()},
        # Experts are three-dimensional, so that one axis more may be right.
        {key: value[None, None] if key == first else value for key, value in tensors.items()},
        {key: value.bool() if key == first else value for key, value in tensors.items()},
    ):
        if name == "dense" and set(changed) != set(tensors):
            # Any name may be a weight's; the base it is applied to decides.
            continue
        save_file({key: value.contiguous() for key, value in changed.items()}, tmp_path / TENSORS)
        with pytest.raises(RequestError, match="cannot be read") as caught:
            load_edit(tmp_path)
        assert "\n" not in str(caught.value)


def test_factors_that_do_not_multiply_are_refused(tmp_path):
    save_edit(_low_rank(), tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    save_file({**tensors, f"{WEIGHT}.right": torch.ones(3, 48)}, tmp_path / TENSORS)
    with pytest.raises(RequestError, match=r"the factors of .* are \[32, 2\] and \[3, 48\]"):
        load_edit(tmp_path)


def test_an_edit_without_its_tensors_or_with_half_a_description_is_one_line(tmp_path):
    save_edit(_low_rank(), tmp_path / "no tensors")
    (tmp_path / "no tensors" / TENSORS).unlink()
    save_edit(replace(_low_rank(), provenance={"a": "b" * 50}), tmp_path / "half")
    text = (tmp_path / "half" / DESCRIPTION).read_text()
    (tmp_path / "half" / DESCRIPTION).write_text(text[: len(text) // 2])
    for folder in ("no tensors", "half"):
        with pytest.raises(ExciseError, match="fetch it again") as caught:
            load_edit(tmp_path / folder)
        assert "\n" not in str(caught.value)


def test_strengths_of_mlps_come_back_and_of_another_number_of_layers_are_refused(tmp_path):
    save_edit(random_edit(make_pico("llama").config.to_dict(), mlp_strengths=(0.0, 0.5)), tmp_path)
    read = load_edit(tmp_path)
    assert [read.strength_at(1, kind) for kind in ("attention", "mlp")] == [1.0, 0.5]
    content = json.loads((tmp_path / "edit.json").read_text())
    (tmp_path / "edit.json").write_text(json.dumps({**content, "mlp_strengths": [0.5]}))
    with pytest.raises(RequestError, match="1 mlp_strengths stand beside 2 layer_strengths"):
        load_edit(tmp_path)


def test_an_edit_that_names_no_strength_for_embeddings_took_everything_out_of_them(tmp_path):
    save_edit(random_edit(make_pico("llama").config.to_dict(), layer_strengths=(0.0, 1.0)), tmp_path)
    assert load_edit(tmp_path).strength_at(None) == 0.0
    content = json.loads((tmp_path / "edit.json").read_text())
    del content["embedding_strength"]
    (tmp_path / "edit.json").write_text(json.dumps(content))
    assert load_edit(tmp_path).strength_at(None) == 1.0


@pytest.mark.parametrize(("key", "value"), [("width", 33), ("rank", 2), ("rank", -1), ("width", "x")])
def test_a_description_that_belies_the_directions_is_refused(tmp_path, key, value):
    save_edit(_edits()["orthogonalize"], tmp_path)
    content = json.loads((tmp_path / DESCRIPTION).read_text())
    (tmp_path / DESCRIPTION).write_text(json.dumps({**content, key: value}))
    with pytest.raises(RequestError, match=key):
        load_edit(tmp_path)
    # Edits of earlier versions may lack it.
    del content[key]
    (tmp_path / DESCRIPTION).write_text(json.dumps(content))
    load_edit(tmp_path)
