"""Training of whole weights: which optimizer is chosen for so much memory, and that the one in 8 bits is what trains."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from excise.artifacts.checkpoints.read import open_checkpoint
from excise.artifacts.events import Events, Stage
from excise.artifacts.models.find import find_model
from excise.editing.errors import RequestError
from excise.recipes.audit import recipe as audit
from excise.recipes.caft.recipe import describe, memory, prepare
from excise.recipes.caft.request import CaftSettings
from excise.recipes.common import whole_weights
from excise.recipes.common.trainer import Group, Schedule, _arguments, fit
from excise.recipes.common.whole_weights import choose, need_of
from helpers import SMALL_TESTBED, make_pico

GIGABYTE = 10**9
INSTALLED = importlib.util.find_spec("bitsandbytes") is not None


def _with_package(monkeypatch, there=True):
    found = SimpleNamespace() if there else None
    monkeypatch.setattr(whole_weights.importlib.util, "find_spec", lambda name: found)


@pytest.mark.parametrize(
    ("free", "device", "expected"),
    [(20, "cuda", "adamw"), (19, "cuda", "adamw_8bit"), (13, "cuda", "paged_adamw_8bit"), (11, "cuda", None),
     (20, "cpu", "adamw"), (19, "cpu", "adamw_8bit"), (13, "cpu", None), (19, "mps", None)],
)  # fmt: skip
def test_the_first_optimizer_that_fits_is_taken(monkeypatch, free, device, expected):
    _with_package(monkeypatch)
    found = choose(GIGABYTE, free * GIGABYTE, torch.device(device))
    assert found.fits == (expected is not None)
    assert found.optimizer == (expected or "adamw") and found.full == 20 * GIGABYTE
    assert bool(found.sentence) == (found.optimizer != "adamw")
    # Named once it is chosen, with what it would have taken in full.
    assert not found.sentence or ("8 bits" in found.sentence and "need 20.0 GB" in found.sentence)


def test_without_the_package_states_stay_in_full_and_what_would_help_is_named(monkeypatch):
    _with_package(monkeypatch, there=False)
    found = choose(GIGABYTE, 15 * GIGABYTE, torch.device("cuda"))
    assert not found.fits and "pip install 'excise[bitsandbytes]'" in found.missing
    assert "pip install" not in choose(GIGABYTE, 11 * GIGABYTE, torch.device("cuda")).missing


def test_a_run_and_an_audit_say_the_optimizer_before_anything_is_loaded(monkeypatch, tmp_path):
    words = {"model": SMALL_TESTBED, "out": tmp_path / "run", "tune": "full"}
    assert "optimizer" not in describe(prepare(CaftSettings(**words)))
    full = {stage.name: stage for stage in memory(prepare(CaftSettings(**words))).stages}["train"].trained
    _with_package(monkeypatch)
    assert need_of(10**6, "adamw") == 20 * 10**6
    checkpoint = prepare(CaftSettings(**words)).adapter.run.checkpoint
    numbers = sum(torch.Size(tensor.shape).numel() for tensor in checkpoint.tensors.values())
    monkeypatch.setattr(whole_weights, "free_memory", lambda device: 15 * numbers)
    job = prepare(CaftSettings(**words))
    assert describe(job)["optimizer"] == job.adapter.optimizer == "adamw_8bit"
    small = next(stage for stage in memory(job).stages if stage.name.startswith("train")).trained
    assert 0.55 < small / full < 0.7
    request = audit.AuditSettings(model="builtin:testbed-reference", attacks=("rtt", "rtt_full"), device="cpu")
    base = open_checkpoint(find_model("builtin:testbed").folder)
    numbers = sum(torch.Size(tensor.shape).numel() for tensor in base.tensors.values())
    checked = audit.prepare(request)
    assert checked.optimizer == "adamw_8bit" and not checked.gaps
    assert any("AdamW's states in 8 bits" in note for note in checked.notes)


def test_the_library_is_asked_for_the_optimizer_by_its_own_name(tmp_path):
    schedule = Schedule(1, 1, 1e-3, 0, optimizer="paged_adamw_8bit", save_every=0)
    arguments = _arguments(schedule, tmp_path, torch.device("cpu"), clipped=True, half=False)
    assert arguments.optim == "paged_adamw_8bit"
    plain = _arguments(Schedule(1, 1, 1e-3, 0), tmp_path, torch.device("cpu"), clipped=True, half=False)
    assert plain.optim.startswith("adamw_torch")


@pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("grouped", [False, True])
def test_states_in_8_bits_train_nearly_as_those_in_full(tmp_path, grouped):
    def trained(optimizer):
        model = make_pico("llama")
        model.requires_grad_(False)
        weight = model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
        # Tensors below 4096 numbers stay in full by bitsandbytes' own rule.
        weight.data = torch.zeros(64, 128)
        goal = torch.linspace(-1, 1, weight.numel()).view_as(weight)
        schedule = Schedule(30, 1, 3e-2, 0, "constant", beta2=0.999, save_every=0, optimizer=optimizer)
        groups = [Group([weight], 3e-2)] if grouped else ()
        rows = [{"x": torch.zeros(1)}] * 30
        fit(model, rows, Stage(Events(), "train"), tmp_path / optimizer, lambda *_: {"a": (weight - goal).square().sum()}, schedule,
            groups=groups)  # fmt: skip
        return weight.detach(), float((weight - goal).square().mean())

    full, small = trained("adamw"), trained("adamw_8bit")
    assert "bitsandbytes" in sys.modules and not torch.equal(full[0], small[0])
    start = float(torch.linspace(-1, 1, 64 * 128).square().mean())
    assert small[1] < 0.5 * start and abs(small[1] - full[1]) < 0.05 * start


def test_a_request_that_fits_with_no_optimizer_is_refused(monkeypatch, tmp_path):
    _with_package(monkeypatch)
    monkeypatch.setattr(whole_weights, "free_memory", lambda device: 10**6)
    with pytest.raises(RequestError, match=r"needs .* GB of memory and 0\.0 GB are free; or use tune=lora"):
        prepare(CaftSettings(tune="full", out=tmp_path / "run"))
