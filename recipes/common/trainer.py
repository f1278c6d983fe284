"""The one trainer: every gradient step of every recipe is taken here."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, save_fsdp_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_callback import PrinterCallback

from ...artifacts.events import Stage
from ...artifacts.files.written import SEAL, files_in, seal_files
from ...editing.errors import ExciseError, OutOfMemory, one_line
from ...editing.modules import causal_model
from ...editing.numerics.out_of_memory import give_back, memory_ran_out
from ...editing.training.dropout import without_dropout
from .ranks import refuse_ranks
from .shares import SHARDED_ADVICE, Shares
from .step_parts import ADVICE, SHARES, Room, split
from .training_state import CHECKPOINT, LAST_GOOD, last_complete
from .whole_weights import Optimizer, computed_in

log = logging.getLogger(__name__)
Terms = dict[str, Tensor]
"""Parts of a loss, each weighted already; their sum is minimized."""
Loss = Callable[[nn.Module, Any], Terms]
"""Terms of the mean loss of a batch."""


@dataclass(frozen=True)
class Schedule:
    """How a model is trained; by AdamW, unless another optimizer is named."""

    steps: int
    batch_size: int
    """Rows a step; with accumulation, rows of each part of it."""
    learning_rate: float
    seed: int
    decay: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    beta2: float = 0.98
    max_grad_norm: float = 1.0
    gradient_accumulation_steps: int = 1
    shuffled: bool = True
    """Take rows in an order that the seed decides; otherwise as they come."""
    save_every: int = 200
    """Steps between the states that a killed run resumes from; 0 stores none."""
    optimizer: Optimizer | Literal["sgd"] = "adamw"
    """How the moments of AdamW are kept; ``sgd`` is plain gradient descent, without momentum."""


@dataclass(frozen=True)
class Group:
    """Parameters with a learning rate of their own."""

    parameters: Sequence[nn.Parameter]
    learning_rate: float
    share: Callable[[int], float] | None = None
    """What the learning rate is multiplied by after a number of steps; by default the schedule decides. Either all
    groups of a training have one or none has."""
    begins_as: tuple[int, int] | None = None
    """Another group, by its place, and a number of steps: after these, parameters and moments are copied from there.
    Until then the loss has no gradient for this group."""


ROWS = "rows"


@dataclass(frozen=True)
class _Rows:
    """Rows of a step, which the library passes on without looking inside."""

    rows: Sequence[Any]


class _StepCallback(TrainerCallback):
    trainer: Any
    """Set once there is one."""
    skipped = 0
    """Steps that were not taken, because gradients in float16 were infinite while their scale was found."""

    def __init__(
        self,
        stage: Stage,
        groups: Sequence[Group] = (),
        max_grad_norm: float = 0.0,
        after_step: Callable[[int], None] | None = None,
    ):
        self.stage, self.groups, self.max_grad_norm, self.after_step = stage, groups, max_grad_norm, after_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.groups and (scaler := getattr(self.trainer.accelerator, "scaler", None)):
            # In float16 gradients are those of a scaled loss until here, and clipping is about the plain ones.
            scaler.unscale_(self.trainer.optimizer.optimizer)
        # Each group is clipped apart: one attacker's large gradient must not shrink the steps of the others.
        for group in self.groups if self.max_grad_norm else ():
            _clip(group.parameters, self.max_grad_norm)
        if state.global_step:
            return
        in_groups = [p for group in self.groups for p in group.parameters]
        trained = in_groups or [p for p in model.parameters() if p.requires_grad]
        if not any(p.grad is not None and bool(p.grad.any()) for p in trained):
            raise ExciseError(
                "no gradient reached what is to be trained, so training would change nothing; "
                "check the layers and the weights of the loss terms"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for parameter in (p for group in self.groups for p in group.parameters):
            # The trainer knows of the model's own parameters alone.
            parameter.grad = None
        for group in self.groups:
            if group.begins_as and group.begins_as[1] == state.global_step:
                _go_on_as(group, self.groups[group.begins_as[0]], self.trainer.optimizer)
        self.skipped += bool(self.trainer.accelerator.optimizer_step_was_skipped)
        self.stage.advance(state.global_step - self.stage.step)
        if self.after_step:
            self.after_step(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The library has written everything else by now, so a state without a seal is half of one.
        if self.trainer.shares and not self.trainer.shares.all_have_written():
            return
        folder = Path(args.output_dir) / f"{CHECKPOINT}{state.global_step}"
        # Names include the folder's, because a state under another number is no state.
        seal_files(folder / SEAL, files_in(folder, f"{folder.name}/"))


class _Trainer(Trainer):
    """The library's trainer with a recipe's own loss."""

    recipe_loss: Loss
    recipe_collate: Callable[[list[Any]], Any]
    stage: Stage
    folder: Path
    room: Room
    groups: Sequence[Group] = ()
    products: torch.dtype | None = None
    is_fsdp_enabled: bool
    shares: Shares | None = None
    """How the processes that hold a part of the model each divide a step."""
    trained: list[nn.Parameter] | None = None
    """All that is trained, once it was looked for."""

    def create_accelerator_and_postprocess(self) -> None:
        """The library's; on processors it knows how to shard, and does not switch that on."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            state = self.accelerator.state
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The library's; of a sharded model its weights, which states of a training hold by themselves."""
        if self.shares is None:
            super().save_model(output_dir, _internal_call)
        elif not _internal_call:
            save_fsdp_model(self.accelerator.state.fsdp_plugin, self.accelerator, self.model, output_dir)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Of several processes, each goes through all rows, and computes its share of every step."""
        if self.shares is None:
            return super().get_train_dataloader()
        loader = DataLoader(
            self.train_dataset,
            self._train_batch_size,
            sampler=self._get_train_sampler(),
            collate_fn=self.data_collator,
        )
        loader = prepare_data_loader(
            loader,
            self.args.device,
            num_processes=1,
            process_index=0,
            put_on_device=False,
            use_seedable_sampler=True,
            data_seed=self.args.data_seed,
        )
        return loader

    def floating_point_ops(self, inputs: Any) -> int:
        """None: the library would count all parameters at every step, and nothing here reads what it finds."""
        return 0

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """All parts of a step; where memory runs out, the same step again in smaller ones."""
        rows = inputs[ROWS].rows
        if not model.training:
            # It goes through all modules, so not at every step.
            model.train()
        while True:
            try:
                return self._whole_step(model, rows)
            except Exception as error:  # the kinds differ between devices; see ``memory_ran_out``
                if not memory_ran_out(error):
                    raise
                words = one_line(error, 120)
            if self.shares:
                # The others are in the middle of the same step, and take as many forwards as this process was to take.
                raise OutOfMemory(f"memory ran out in a training step of a sharded model ({words}); {SHARDED_ADVICE}")
            # Outside the handler, whose exception would keep the failed part's tensors alive.
            for parameter in (*model.parameters(), *(p for group in self.groups for p in group.parameters)):
                # A part may have left its gradient before the next one failed.
                parameter.grad = None
            give_back()
            if not self.room.shrink(model, len(rows)):
                raise OutOfMemory(f"memory ran out in a training step that reads one row at a time ({words}); {ADVICE}")

    def _whole_step(self, model: nn.Module, rows: Sequence[Any]) -> Tensor:
        sums: Terms = {}
        divide = self.shares.of if self.shares else split
        for part in divide(rows, self.room.parts, self.recipe_collate):
            with self.compute_loss_context_manager(), computed_in(self.products, self.args.device):
                terms = self._terms(model, self._prepare_inputs(part.batch))
                weighted = {name: value / part.divisor for name, value in terms.items()}
                loss = torch.stack(list(weighted.values())).sum()
            self.accelerator.backward(loss)
            sums = {name: sums.get(name, 0.0) + value.detach() for name, value in weighted.items()}
        assert sums, "a step has rows"
        stacked = torch.stack(list(sums.values()))
        if self.shares:
            stacked = self.shares.mean(stacked)
        # The one place where a step waits for its device: all terms of all parts at once.
        self._check(dict(zip(sums, stacked.tolist(), strict=True)))
        return stacked.sum()

    def _terms(self, model: nn.Module, inputs: Any) -> Terms:
        """The loss's terms, each with its share of the step."""
        terms = self.recipe_loss(model, inputs)
        shares = inputs.get(SHARES, {}) if isinstance(inputs, dict) else {}
        return {name: value * shares[name] if name in shares else value for name, value in terms.items()}

    def _check(self, values: dict[str, float]) -> None:
        """Tell the terms' values, and refuse a step in which one is no number."""
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            # No step was taken with this gradient, so what is in memory is still good.
            self.save_model(str(self.folder / LAST_GOOD))
            raise ExciseError(
                f"the loss became {values[broken[0]]} at step {self.state.global_step + 1}, in the term"
                f" {broken[0]}; the state before it is in {self.folder.name}/{LAST_GOOD}. Lower the learning rate"
            )
        if self.state.global_step % self.args.logging_steps == 0:
            self.stage.advance(0, **values)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self.accelerator.unscale_gradients()
        if self.trained is None:
            self.trained = [p for p in model.parameters() if p.requires_grad]
        return _clip(self.trained, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """What clipping found; the library measures it where nothing is clipped, and nothing here reads that."""
        return grad_norm


@torch.no_grad()
def _go_on_as(group: Group, other: Group, optimizer: Any) -> None:
    """Give a group the parameters and moments of another."""
    states = getattr(optimizer, "optimizer", optimizer).state
    for parameter, like in zip(group.parameters, other.parameters, strict=True):
        parameter.copy_(like)
        if like in states:
            states[parameter] = {
                name: value.clone() if isinstance(value, Tensor) else value for name, value in states[like].items()
            }


def _clip(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Scale gradients down to a norm, all in a few operations; on processors the library would go one by one."""
    on_processor = all(parameter.device.type == "cpu" for parameter in parameters)
    return nn.utils.clip_grad_norm_(parameters, most, foreach=True if on_processor else None)


def fit(
    model: nn.Module,
    rows: Sequence[Any],
    stage: Stage,
    folder: Path,
    loss: Loss,
    schedule: Schedule,
    collate: Callable[[list[Any]], Any] | None = None,
    groups: Sequence[Group] = (),
    after_step: Callable[[int], None] | None = None,
    less: Callable[[], bool] = lambda: False,
    parts: int = 1,
    products: torch.dtype | None = None,
    shares: Shares | None = None,
) -> Room:
    """Train a model in place; a killed run resumes from ``folder`` and ends in the same weights.

    Where memory runs out, the step is taken again in smaller parts, with the same gradient.

    Args:
        rows: What a batch is made of, each used at most once an epoch.
        folder: Where optimizer states are stored during training.
        collate: Makes a batch; by default rows are dictionaries of tensors of one length.
        groups: Parameters that are trained beside each other, each with a learning rate and a clipping of its own.
        after_step: Called with the number of steps taken, after each.
        less: Makes the loss compute less of a row at once; called where one row alone is too much.
        parts: Parts of each part that accumulation asks for, as a memory plan says.
        products: What matrix products of the loss are computed in where that is not the parameters' type, see
            ``products_in``; softmaxes, norms and sums stay in fp32.
        shares: Of a model whose weights are spread over processes, how they divide a step; each of them calls this.

    Returns:
        How much was computed at once in the end.

    Raises:
        OutOfMemory: One row alone does not fit.
        ExciseError: A term of the loss is not finite, or no gradient reached what is to be trained.
        RequestError: A stored state was changed since it was written.
    """
    device = _device_of(model)
    if shares is None:
        refuse_ranks()
    half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    optimizer = _grouped(groups, schedule) if groups else None
    steps = _StepCallback(stage, groups, schedule.max_grad_norm, after_step)
    trainer = _Trainer(
        model=model,
        args=_arguments(schedule, folder, device, clipped=not groups, half=half, sharded=shares is not None),
        train_dataset=list(rows),
        data_collator=lambda some: {ROWS: _Rows(some)},
        optimizers=(optimizer, _by_groups(optimizer, groups)),
        callbacks=[steps],
    )
    trainer.recipe_loss, trainer.recipe_collate = loss, collate or default_data_collator
    trainer.stage, trainer.folder, trainer.groups, trainer.products = stage, folder, groups, products
    steps.trainer, trainer.shares = trainer, shares
    asked = schedule.gradient_accumulation_steps
    trainer.room = room = Room(asked * parts, asked, less)
    trainer.model_accepts_loss_kwargs = False
    # It prints every log to stdout, where results go.
    trainer.pop_callback(PrinterCallback)
    try:
        with without_dropout(model), _own_forward(model):
            last = shares.resume if shares else last_complete(folder, schedule.steps)
            trainer.train(resume_from_checkpoint=last)
    finally:
        room.restore(model)
    taken, skipped = trainer.state.global_step, steps.skipped
    # The library's trainer refers to itself, so the moments and all else that it held would stay until they are looked for.
    del trainer, steps, optimizer
    give_back()
    if skipped:
        log.warning(
            "%d of %d steps changed nothing, while the scale of float16 gradients was found", skipped, schedule.steps
        )
    if taken != schedule.steps:
        raise ExciseError(
            f"training ended at step {taken} of {schedule.steps}, so nothing is published; start the run again"
        )
    return room


@contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """Afterwards the model computes as it did: the library leaves its autocast on ``forward``, where whatever is asked of
    a trained fp32 model would be answered in 16 bits."""
    attributes = vars(model)
    before: dict[str, Any] = {name: attributes[name] for name in ("forward", "_original_forward") if name in attributes}
    try:
        yield
    finally:
        for name in ("forward", "_original_forward"):
            attributes.pop(name, None)
        attributes.update(before)


def _device_of(model: nn.Module) -> torch.device:
    """Where the batches of a training go.

    Raises:
        ExciseError: A part of the model is not on a device.
    """
    places = {str(place) for place in getattr(causal_model(model), "hf_device_map", {}).values()}
    if len(places) > 1 and places & {"cpu", "disk"}:
        raise ExciseError(
            "a part of the model is in main memory or on disk, from where it cannot be trained; use a GPU that holds it"
        )
    return next(model.parameters()).device


@dataclass
class _Arguments(TrainingArguments):
    """The library's, for the device that the model is on: by itself it takes every GPU that it sees."""

    model_device: str = "cpu"

    @property
    def device(self) -> torch.device:
        assert self._setup_devices, "the library sets up more than the device"
        return torch.device(self.model_device)

    @property
    def n_gpu(self) -> int:
        return int(self.device.type == "cuda")


def _arguments(
    schedule: Schedule, folder: Path, device: torch.device, *, clipped: bool, half: bool, sharded: bool = False
) -> TrainingArguments:
    arguments = _Arguments(
        output_dir=str(folder),
        model_device=str(device),
        max_steps=schedule.steps,
        # The whole step: its parts are made where it is computed, so that they can be made again.
        per_device_train_batch_size=schedule.batch_size * schedule.gradient_accumulation_steps,
        learning_rate=schedule.learning_rate,
        # The library's plain "constant" schedule has no warm-up.
        lr_scheduler_type=schedule.decay if schedule.decay == "cosine" else "constant_with_warmup",
        warmup_steps=schedule.warmup_steps,
        weight_decay=schedule.weight_decay,
        adam_beta2=schedule.beta2,
        # Groups are clipped apart, by the callback.
        max_grad_norm=schedule.max_grad_norm if clipped else 0.0,
        seed=schedule.seed,
        data_seed=schedule.seed,
        **precision(device, half),
        **({} if schedule.optimizer == "adamw" else {"optim": schedule.optimizer}),
        **({"fsdp": True, "fsdp_config": FSDP} if sharded else {}),
        # The library knows CUDA and Apple's GPUs; any other device is the processor to it, and models stay where they are.
        use_cpu=device.type not in ("cuda", "mps"),
        save_strategy="steps" if schedule.save_every else "no",
        save_steps=schedule.save_every or 500,
        # A run is resumed from its newest state only.
        save_total_limit=1,
        logging_steps=25,
        # A loss that is no number ends the training here, so that the library need not look at each.
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        # Batches hold more than the model's arguments, and the trainer would drop the rest.
        remove_unused_columns=False,
        train_sampling_strategy="random" if schedule.shuffled else "sequential",
    )
    if device.type == "cuda":
        # The library has just made its first GPU the current one.
        torch.cuda.set_device(device)
    return arguments


FSDP = {"version": 2, "auto_wrap_policy": "NO_WRAP", "state_dict_type": "SHARDED_STATE_DICT"}
"""The model is sharded before the library sees it; what it stores to resume from is whole, in one process's files."""


def precision(device: torch.device, half: bool) -> dict[str, bool]:
    """What the library does about types; ``half`` says that frozen weights are in float16.

    Else nothing: products are computed in the type that the model was loaded in. The library would compute what calls the
    whole model in bfloat16 wherever that is fast, also where the user asked for float32, and not what calls its decoder.
    """
    # With fp16 the library scales the loss, because gradients below 6e-8 are 0 in it; it can on CUDA alone.
    return {"fp16": half and device.type == "cuda", "bf16": False}


def _grouped(groups: Sequence[Group], schedule: Schedule) -> torch.optim.Optimizer:
    parameters: list[dict[str, Any]] = [
        {"params": list(group.parameters), "lr": group.learning_rate} for group in groups
    ]
    how: dict[str, Any] = {"betas": (0.9, schedule.beta2), "weight_decay": schedule.weight_decay}
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **how)
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    kind = PagedAdamW8bit if schedule.optimizer == "paged_adamw_8bit" else AdamW8bit
    optimizer: torch.optim.Optimizer = kind(parameters, **how)
    return optimizer


def _by_groups(optimizer: torch.optim.Optimizer | None, groups: Sequence[Group]) -> LambdaLR | None:
    """Learning rates of which each group has its own course; None leaves the schedule to the library."""
    shares = [group.share for group in groups if group.share]
    if not shares:
        return None
    assert optimizer is not None and len(shares) == len(groups)
    return LambdaLR(optimizer, shares)
