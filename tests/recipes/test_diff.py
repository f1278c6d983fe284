"""What a difference says of two checkpoints is what was done to one of them."""

import json
import shutil

import pytest
import torch
from excise.artifacts.models.find import find_model
from excise.editing.errors import RequestError
from excise.recipes.diff import difference
from helpers import excise
from safetensors.torch import load_file, save_file

NAME = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """The built-in model with rank 2 added to one matrix and one value of one vector changed."""
    folder = tmp_path_factory.mktemp("changed") / "model"
    shutil.copytree(find_model("builtin:testbed").folder, folder)
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder.parent / "base.safetensors", {"format": "pt"})
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(tensors[NAME].shape[0], 2, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(tensors[NAME].shape[1], 2, generator=generator))
    tensors[NAME] = tensors[NAME] + left @ torch.diag(torch.tensor([3.0, 1.0])) @ right.T
    tensors["model.norm.weight"][5] += 0.25
    base = folder.parent / "base"
    shutil.copytree(folder, base)
    shutil.move(folder.parent / "base.safetensors", base / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(base), str(folder)


def _with_norm(model, folder, norm):
    """A copy of a model with another final norm."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.norm.weight": norm}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_each_changed_tensor_is_told_with_its_rank_and_no_other(changed):
    found = difference(*changed)
    by_name = {item.name: item for item in found.changed}
    assert set(by_name) == {NAME, "model.norm.weight"} and found.same == 72 and not found.only_in_a
    item = by_name[NAME]
    assert item.singular_values[:2] == pytest.approx([3.0, 1.0], rel=1e-3) and item.singular_values[2] < 1e-2
    shares = torch.tensor([0.75, 0.25])
    assert item.spectrum.effective_rank == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=0.05)
    assert by_name["model.norm.weight"].largest == pytest.approx(0.25) and by_name["model.norm.weight"].spectrum is None


def test_it_is_said_where_the_change_is_and_that_it_is_one_low_rank_adapter(changed):
    found = difference(*changed).anatomy
    assert (found.layers, found.layers_untouched) == (1, (0, 1, 3, 4, 5, 6, 7))
    assert (found.matrices, found.shallow, found.deepest_cliff) == (1, 1, 2)
    assert found.shares["mlp"] == pytest.approx(10 / 10.0625, rel=1e-3) and set(found.shares) == {"mlp", "other"}
    said = excise("diff", *changed).stdout
    assert "shallow: in 1 of 1 matrices the change ends in a cliff at rank 2 or below" in said
    assert "layers that changed: 1 of 8; untouched: 0, 1, 3, 4, 5, 6, 7" in said


def test_a_model_does_not_differ_from_itself(changed):
    found = difference(changed[0], changed[0])
    assert found.changed == () and found.same == 74


def test_a_tensor_that_was_zero_has_no_relative_change_and_stands_first(changed, tmp_path):
    folder = _with_norm(changed[0], tmp_path / "zeroed", torch.zeros(192))
    done = excise("diff", folder, changed[1], "--json")
    first = json.loads(done.stdout, parse_constant=pytest.fail)["changed"][0]
    assert first["name"] == "model.norm.weight" and first["relative_norm"] is None
    assert "was zero" in excise("diff", folder, changed[1]).stdout


def test_models_of_unlike_shape_are_not_compared(changed, tmp_path):
    folder = _with_norm(changed[0], tmp_path / "other", torch.ones(3))
    with pytest.raises(RequestError, match=r"model\.norm\.weight is \[192\] in base and \[3\] in other"):
        difference(changed[0], str(folder))


def test_the_command_writes_table_and_plot(changed, tmp_path):
    done = excise("diff", *changed, "--out", tmp_path / "diff")
    assert done.returncode == 0, done.stderr
    assert "2 tensors differ, 72 equal bit for bit" in done.stdout and NAME in done.stdout
    assert json.loads((tmp_path / "diff" / "diff.json").read_text())["changed"][0]["name"] == NAME
    assert (tmp_path / "diff" / "diff.svg").read_text().count("<svg") == 1
