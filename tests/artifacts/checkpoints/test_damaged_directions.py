"""A directions file that is not what was written: nothing else is ablated under its name."""

import json

import pytest
import torch
from excise.artifacts.checkpoints.directions import load_directions, save_directions
from excise.editing.directions.subspaces import Place, Subspace
from excise.editing.errors import EditError, RequestError
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def _directions(width=8):
    basis = torch.linalg.qr(torch.randn(width, 2, generator=torch.Generator().manual_seed(0))).Q
    one = Subspace(Place(1, "mlp"), basis, torch.ones(width), ("a", "b"), (2.0, 1.0), "pairs", None, {"seed": 0})
    return one, Subspace(Place(0), basis[:, :1], torch.ones(width), ("a",), (2.0,), "leace", basis[:, :1].clone())


@pytest.fixture
def file(tmp_path):
    save_directions(_directions(), tmp_path / "directions.safetensors")
    return tmp_path / "directions.safetensors"


def _rewritten(file, header=None, tensors=None):
    with safe_open(file, "pt") as opened:
        text = opened.metadata()["excise"]
    before = load_file(file)
    text = header(json.loads(text)) if header else text
    save_file((tensors or (lambda t: t))(before), file, {"excise": text if isinstance(text, str) else json.dumps(text)})


def test_directions_come_back_as_they_were_written(file):
    written, read = _directions(), load_directions(file, width=8, layers=2)
    for before, after in zip(written, read, strict=True):
        assert (before.place, before.names, before.provenance) == (after.place, after.names, after.provenance)
        assert torch.equal(before.basis, after.basis) and (before.readers is None) == (after.readers is None)


def _with(place, value):
    def change(content):
        spot = content["subspaces"][0]
        for key in place[:-1]:
            spot = spot[key]
        spot[place[-1]] = value
        return content

    return change


@pytest.mark.parametrize(
    "header, told",
    [
        (lambda content: {**content, "subspaces": []}, "it holds no directions"),
        (lambda content: {**content, "schema_version": 9}, "its version is 9"),
        (lambda content: {"subspaces": content["subspaces"]}, "its version is None"),
        (_with(("place", "layer"), -1), "subspaces.0.place.layer: input should be greater than or equal to 0, got -1"),
        (_with(("place", "layer"), True), "subspaces.0.place.layer: input should be a valid integer"),
        (_with(("place", "layer"), 2), "are at the mlp of layer 2, the model has layers 0 to 1"),
        (_with(("place", "site"), "outputs"), "subspaces.0.place.site: input should be 'input', 'output'"),
        (_with(("scores",), [1.0, "x"]), "subspaces.0.scores.1: input should be a valid number"),
        (_with(("names",), ["a"]), "1 names"),
        (lambda content: json.dumps(content).replace("2.0", "NaN", 1), "NaN is not a finite number"),
        (lambda content: json.dumps(content)[:-4], "not JSON"),
        (lambda content: "[" * 5000, "nested deeper than 100 levels"),
        (lambda content: {**content, "subspaces": content["subspaces"][:1]}, "tensors are not those of its 1 places"),
    ],
)
def test_a_header_of_another_form_is_refused(file, header, told):
    _rewritten(file, header)
    with pytest.raises(RequestError, match=told) as caught:
        load_directions(file, width=8, layers=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tensors, told",
    [
        (lambda t: {**t, "0.basis": t["0.basis"] * float("nan")}, "0.basis holds NaN"),
        (lambda t: {**t, "0.offset": t["0.offset"] / 0}, "0.offset holds NaN or infinite"),
        (lambda t: {**t, "1.readers": t["1.readers"] * float("inf")}, "1.readers holds NaN"),
        (lambda t: {key: value for key, value in t.items() if key != "0.offset"}, "0.offset"),
        (lambda t: {**t, "0.basis": t["0.basis"][:, 0].contiguous()}, "not floats"),
        (lambda t: {**t, "0.basis": (t["0.basis"] * 10).long()}, "not floats"),
        (lambda t: {**t, "1.readers": t["1.readers"].repeat(1, 2)}, "readers are not of the shape"),
        (lambda t: {**t, "0.basis": t["0.basis"][:7].contiguous()}, "0.offset is of width 8, 0.basis of 7"),
        (lambda t: {**t, "7.basis": t["0.basis"].clone()}, "7.basis"),
    ],
)
def test_tensors_of_another_form_are_refused(file, tensors, told):
    _rewritten(file, tensors=tensors)
    with pytest.raises(RequestError, match=told) as caught:
        load_directions(file, width=8, layers=2)
    assert "\n" not in str(caught.value)


def test_a_cut_file_and_a_file_without_directions_are_refused(file, tmp_path):
    data = file.read_bytes()
    for length in (0, 7, 40, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(RequestError, match="not a whole safetensors file"):
            load_directions(file)
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(RequestError, match="holds no directions of excise"):
        load_directions(file)
    with pytest.raises(RequestError, match="No such file"):
        load_directions(tmp_path / "nowhere.safetensors")


def test_directions_that_are_not_finite_are_not_written(tmp_path):
    one, _ = _directions()
    broken = Subspace(one.place, one.basis, one.offset * float("nan"), one.names, one.scores, one.source)
    with pytest.raises(EditError, match=r"0\.offset holds NaN"):
        save_directions([broken], tmp_path / "directions.safetensors")
    assert not (tmp_path / "directions.safetensors").exists()
