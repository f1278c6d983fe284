"""A training by one process, or by several that hold a part of the model's weights each (FSDP 2).

Process 0 has the whole model, from which the parts are filled, and into which what was learned is gathered: so everything
before and after the training, and what looks at the model meanwhile, is as in one process. What is not trained layer by
layer, such as embeddings, is whole in every process, so that losses can read the unembedding.
"""

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...artifacts.events import Events, Stage
from ...artifacts.models.memory import release_memory
from ...editing.errors import ExciseError
from ...editing.modules import decoder_of
from ...editing.numerics.cpu_attention import PRODUCTS, make_products_known
from .objective import Objective
from .ranks import Launch, taken_out
from .shares import Shares
from .step_parts import Room
from .team import LONG, TEAM, TRAIN, Team
from .trainer import Schedule, fit, last_complete


@dataclass(frozen=True)
class SharedTraining:
    """What every process is told of a training."""

    outline: Any
    """The model without its weights."""
    layers: str
    """Where its layers are."""
    objective: Objective
    schedule: Schedule
    folder: Path
    device: str
    """The kind of device."""
    parts: int
    products: torch.dtype | None
    looks: frozenset[int]
    """Steps after which the whole model is looked at."""
    resume: str | None
    """The state that the training goes on from."""


def fit_objective(
    model: Any,
    objective: Objective,
    stage: Stage,
    folder: Path,
    schedule: Schedule,
    layers: str,
    *,
    after_step: Callable[[int], None] = lambda _: None,
    looks: Callable[[int], bool] = lambda _: False,
    parts: int = 1,
    products: torch.dtype | None = None,
) -> Room:
    """Train a model in place, as ``fit``; together with other processes, where there are some.

    Args:
        layers: Name of the list of the model's layers.
        after_step: Called with the number of steps taken, after each; where processes share the training, after those
            that ``looks`` names.
    """
    team = TEAM.get()
    if team is None:
        how: dict[str, Any] = {"after_step": after_step, "less": objective.less, "parts": parts, "products": products}
        with objective.while_training(model):
            return fit(model, objective.rows, stage, folder, objective.loss, schedule, objective.collate, **how)
    folder.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device.type
    resume = last_complete(folder, schedule.steps, sharded=True)
    seen = frozenset(step for step in range(1, schedule.steps + 1) if looks(step))
    with in_main_memory(model):
        task = SharedTraining(
            outlined(model), layers, objective, schedule, folder.absolute(), device, parts, products, seen, resume
        )
        team.tell(TRAIN, task)
        team.trainings += 1
        with team.watched():
            return _train(team.launch, team.store, team.trainings, task, stage, model, after_step)


def take_part(launch: Launch, store: Any, number: int, task: SharedTraining) -> None:
    """The part of a process other than 0 in a training."""
    with Events().stage("train") as stage:
        _train(launch, store, number, task, stage)


def _train(
    launch: Launch,
    store: Any,
    number: int,
    task: SharedTraining,
    stage: Stage,
    whole: Any = None,
    after_step: Callable[[int], None] = lambda _: None,
) -> Room:
    local = launch.variables.get("LOCAL_RANK", "0")
    device = torch.device(task.device if task.device == "cpu" else f"{task.device}:{local}")
    with _group(launch, store, number, device):
        model = _sharded(task.outline, task.layers, device)
        _fill(model, whole, device)

        def after(step: int) -> None:
            if step in task.looks:
                _gather(model, whole)
                after_step(step)

        shares = Shares(launch.rank, launch.count, task.objective.pieces, task.resume)
        objective = task.objective
        with objective.while_training(model):
            room = fit(
                model,
                objective.rows,
                stage,
                task.folder,
                objective.loss,
                task.schedule,
                objective.collate,
                after_step=after,
                parts=task.parts,
                products=task.products,
                shares=shares,
            )
        _gather(model, whole)
        del model
    release_memory()
    return room


@contextmanager
def _group(launch: Launch, store: Any, number: int, device: torch.device) -> Iterator[None]:
    """All processes meet, and part again afterwards; each training by a name of its own."""
    import torch.distributed as dist
    from accelerate.state import AcceleratorState

    if device.type == "cuda":
        torch.cuda.set_device(device)
    with launch.in_environment():
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "cuda:nccl,cpu:gloo",
            store=dist.PrefixStore(f"training {number}", store),
            rank=launch.rank,
            world_size=launch.count,
            timeout=LONG,
        )
        try:
            yield
        finally:
            # Otherwise the library would take the process for one of several ever after.
            AcceleratorState._reset_state(reset_partial_state=True)
            taken_out(os.environ)
            dist.destroy_process_group()


def outlined(model: Any) -> Any:
    """A copy of a model without its weights and without hooks, which can be sent to another process."""
    outline = _copied(model, lambda _: torch.device("meta"))
    for module in outline.modules():
        # Those of a loaded model count what it reads; the whole model goes on counting.
        for hooks in (
            "_forward_hooks",
            "_forward_hooks_with_kwargs",
            "_forward_pre_hooks",
            "_forward_pre_hooks_with_kwargs",
        ):
            getattr(module, hooks).clear()
    return outline


def _copied(model: Any, place: Callable[[str], torch.device]) -> Any:
    """A copy with empty weights on some device each; what is tied stays tied."""
    memo: dict[int, Any] = {}
    for name, weight in model.named_parameters():
        empty = torch.empty_like(weight, device=place(name))
        memo[id(weight)] = nn.Parameter(empty, requires_grad=weight.requires_grad)
    for name, buffer in model.named_buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device=place(name))
    return copy.deepcopy(model, memo)


def _sharded(outline: Any, where: str, device: torch.device) -> Any:
    """The model with an empty part of its layers' weights on the device; ``where`` is the name of their list."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = _copied(outline, lambda name: torch.device("meta") if name.startswith(f"{where}.") else device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    layers = list(model.get_submodule(where))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    inside = {id(weight) for layer in layers for weight in layer.parameters()}
    outside = {weight for weight in model.parameters() if id(weight) not in inside}
    # Losses call the decoder and never the whole model, so the decoder is where the layers' parts are led from; the
    # library looks for a mark on the whole model.
    for module in dict.fromkeys((decoder_of(model), model)):
        fully_shard(module, mesh=mesh, ignored_params=outside)
    for layer in layers:
        layer.to_empty(device=device)
    if getattr(model.config, "_attn_implementation", None) == PRODUCTS:
        make_products_known()
    return model.eval()


def _tensors(model: Any) -> Mapping[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def _fill(model: Any, whole: Any, device: torch.device) -> None:
    """Give every process its part of the whole model, which process 0 has."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, distribute_tensor

    source = _tensors(whole) if whole is not None else {}
    for name, target in _tensors(model).items():
        full = (
            source[name].detach().to(device) if source else torch.empty(target.shape, dtype=target.dtype, device=device)
        )
        if isinstance(target, DTensor):
            # Of the processes' tensors, that of process 0 alone is read.
            target.to_local().copy_(distribute_tensor(full, target.device_mesh, target.placements).to_local())
        else:
            target.copy_(full)
            dist.broadcast(target, 0)


@torch.no_grad()
def _gather(model: Any, whole: Any) -> None:
    """Put what was trained into the whole model, in process 0."""
    weights = dict(whole.named_parameters()) if whole is not None else {}
    for name, part in model.named_parameters():
        if part.requires_grad:
            full = part.full_tensor()
            if weights:
                weights[name].copy_(full)


@contextmanager
def in_main_memory(model: Any) -> Iterator[None]:
    """Keep a GPU's model in main memory while the context lasts: its parts are on the GPU.

    Raises:
        ExciseError: It is spread over several GPUs, where the other processes work.
    """
    places = {name: tensor.device for name, tensor in _tensors(model).items()}
    if len(set(places.values())) > 1:
        raise ExciseError(
            "the model is spread over several GPUs, which the other processes work on; start the command without a"
            " launcher, or choose a model that one GPU can hold"
        )
    tensors = {name: tensor for name, tensor in _tensors(model).items() if tensor.device.type != "cpu"}
    try:
        for tensor in tensors.values():
            tensor.data = tensor.data.cpu()
        if tensors:
            release_memory()
        yield
    finally:
        for name, tensor in tensors.items():
            tensor.data = tensor.data.to(places[name])


__all__ = ["SharedTraining", "Team", "fit_objective", "take_part"]
