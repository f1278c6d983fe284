"""Everything in editing/ and eval/ computes where the model is: on a GPU, on two, and on one without float64."""

import ast
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import excise
import pretended
import pytest
import torch
from device_scenarios import SCENARIOS, leaves
from excise.editing.numerics import wide
from pretended import MixedDevices, Pretended, on_gpu, on_two_gpus, pretended_gpus
from torch import nn

ROOT = Path(excise.__file__).parent
MACHINES: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "a GPU": (on_gpu, True),
    "two GPUs": (on_two_gpus, True),
    "a GPU without float64": (on_gpu, False),
}
"""How inputs get there, and whether there is float64."""
NOTED = "two GPUs"

ON_THE_PROCESSOR = {
    "editing/edits/base.py": "edits stream each matrix through the processor; edit_model does it in the scenario edits",
    "editing/edits/adapter_merge.py": "blocks of a checkpoint, on the processor",
    "editing/edits/changes.py": "blocks of a checkpoint, on the processor",
    "editing/edits/dense.py": "blocks of a checkpoint, on the processor",
    "editing/edits/low_rank.py": "blocks of a checkpoint, on the processor",
    "editing/edits/projection.py": "blocks of a checkpoint, on the processor",
    "editing/edits/pruned_units.py": "blocks of a checkpoint, on the processor",
    "editing/edits/subspace_removal.py": "blocks of a checkpoint, on the processor",
    "editing/numerics/stored_formats.py": "tensors as files store them, on the processor",
    "editing/wiring/bench.py": "small random copies of a model, on the processor",
    "editing/wiring/experts.py": "pieces of a checkpoint, on the processor",
    "eval/anatomy.py": "matrices of two checkpoints, on the processor",
    "editing/wiring/derived.py": "small random copies of a model, on the processor",
    "editing/wiring/proof.py": "small random copies of a model, on the processor",
    "editing/wiring/small_copy.py": "small random copies of a model, on the processor",
    "editing/wiring/stored.py": "names and shapes of a checkpoint",
}
"""Files whose functions get tensors on the processor alone, and why; those of them that get a model are in scenarios."""
NO_TENSORS = {
    "DirectionSource.__call__": "a protocol",
    "attend_by_products": "for models on the processor; attention itself is in the scenario products",
    "without_adapter": "counts parameters",
    "adapter_experts": "counts experts",
    "adapter_shape": "names of modules",
    "LiveBytes.__init__": "counts bytes of a model without values",
    "without_dropout": "sets rates; the trainer's tests run it",
    "lettered_prompt": "a text",
    "novice_text": "a text",
    "rouge_recall": "texts",
    "is_conv1d": "the type of a module",
    "summarize": "numbers that were measured",
    "losses": "numbers that were measured",
    "priv_leak": "numbers that were measured",
    "probability_and_ratio": "numbers that were measured",
    "set_aside": "a configuration",
    "lm_eval:scores": "lm-eval's own forwards, on the model's device",
}
"""Functions without a computation of their own on a device, and why."""
TAKES = ("Tensor", "Module", "torch.device")


def public_functions() -> dict[str, str]:
    """Public functions of editing/ and eval/ that take tensors, modules, devices or a model: where, by place and name."""
    return {
        f"{path.relative_to(ROOT)}:{name}": name
        for part in ("editing", "eval")
        for path in sorted((ROOT / part).rglob("*.py"))
        for name in _functions(ast.parse(path.read_text()).body, "")
    }


def _functions(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _functions(node.body, f"{node.name}.")
        if isinstance(node, ast.FunctionDef) and (
            not node.name.startswith("_") or node.name in ("__init__", "__call__")
        ):
            taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            named = [a.arg in ("model", "subject") or _is_tensor(a) for a in taken]
            if any(named):
                yield prefix + node.name


def _is_tensor(argument: ast.arg) -> bool:
    return argument.annotation is not None and any(kind in ast.unparse(argument.annotation) for kind in TAKES)


@cache
def outcome(scenario: str, machine: str | None) -> tuple[list[Any], list[Any], frozenset[str]]:
    """What a scenario returns on a machine (None: the processor), and the functions that it entered."""
    codes: set[CodeType] = set()

    def note(frame: FrameType, _: str, __: Any) -> None:
        # Asked at every call of a Python function; that nothing is returned leaves out its lines.
        codes.add(frame.f_code)

    if machine is None:
        placed, plain = SCENARIOS[scenario](lambda value: value)
        return [*leaves(placed)], [*leaves(plain)], frozenset()
    place, has_float64 = MACHINES[machine]
    if not has_float64:
        wide.NO_FLOAT64.add(pretended.GPU.type)
    # Calls are noted on one machine only, because that takes long.
    before = sys.gettrace()
    sys.settrace(note if machine == NOTED else before)
    try:
        with pretended_gpus(wide=has_float64):
            placed, plain = SCENARIOS[scenario](place)
    finally:
        sys.settrace(before)
        wide.NO_FLOAT64.discard(pretended.GPU.type)
    inside = [code for code in codes if Path(code.co_filename).is_relative_to(ROOT)]
    entered = {f"{Path(code.co_filename).relative_to(ROOT)}:{code.co_qualname}" for code in inside}
    return [*leaves(placed)], [*leaves(plain)], frozenset(entered)


def _near(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        other = other.detach().cpu()
        return torch.allclose(one.detach().double(), other.double(), atol=1e-5, rtol=1e-5, equal_nan=True)
    return (
        bool(one == pytest.approx(other, abs=1e-5, rel=1e-5, nan_ok=True)) if isinstance(one, float) else one == other
    )


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_results_are_on_the_device_and_equal_the_processors(scenario, machine):
    expected = outcome(scenario, None)
    placed, plain, _ = outcome(scenario, machine)
    tensors = [value for value in placed if isinstance(value, torch.Tensor)]
    assert all(isinstance(value, Pretended) for value in tensors)
    assert not any(isinstance(value, Pretended) for value in plain)
    for before, after in zip(expected[:2], (placed, plain), strict=True):
        assert all(_near(one, other) for one, other in zip(before, after, strict=True))


def test_every_public_function_with_tensors_runs_on_a_gpu_or_says_why_not():
    entered = {name for scenario in SCENARIOS for name in outcome(scenario, NOTED)[2]}
    missing = {
        place: name
        for place, name in public_functions().items()
        if place not in entered
        and name not in NO_TENSORS
        and f"{Path(place.split(':')[0]).stem}:{name}" not in NO_TENSORS
        and place.split(":")[0] not in ON_THE_PROCESSOR
    }
    assert not missing
    # A function that takes a model is in a scenario wherever it stands.
    assert {"editing/edits/base.py:edit_model", "editing/edits/pruned_units.py:keep_pruned"} <= entered


def test_reasons_name_what_exists():
    files = {place.split(":")[0] for place in public_functions()}
    names = {name for place in public_functions() for name in (place.split(":")[1], _short(place))}
    assert set(ON_THE_PROCESSOR) <= files and set(NO_TENSORS) <= names


def _short(place: str) -> str:
    file, _, name = place.partition(":")
    return f"{Path(file).stem}:{name}"


def test_a_pretended_gpu_refuses_what_a_gpu_refuses():
    with pretended_gpus(wide=False):
        there, here = on_gpu(torch.ones(3)), torch.ones(3)
        # A number goes everywhere, and indices may stay on the processor.
        assert ((there + 1) * torch.tensor(2.0))[torch.tensor([0, 2])].tolist() == [4.0, 4.0]
        for wrong in (
            lambda: there + here,
            lambda: here[on_gpu(torch.tensor([0]))],
            lambda: there + on_gpu(torch.ones(3), pretended.SECOND_GPU),
            lambda: nn.Linear(3, 2)(there),
        ):
            with pytest.raises(MixedDevices):
                wrong()
        with pytest.raises(TypeError, match="float64"):
            there.double()
