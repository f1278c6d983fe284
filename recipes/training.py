"""The one trainer: every gradient step of every recipe is taken here."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..artifacts.events import Stage
from ..artifacts.models import bfloat16_is_fast
from ..editing.errors import ExciseError


class _Watch(TrainerCallback):
    def __init__(self, stage: Stage):
        self.stage = stage

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stage.advance(state.global_step - self.stage.step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None:
            if loss != loss:
                raise ExciseError(f"the loss became NaN at step {state.global_step}; lower the learning rate")
            self.stage.advance(0, loss=loss)


Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]
"""Mean loss of a batch, in nats a token."""


class _Trainer(Trainer):
    """The library's trainer with a recipe's own loss."""

    own_loss: Loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = self.own_loss(model, inputs)
        return (loss, {}) if return_outputs else loss


def fit(
    model: nn.Module, rows: Sequence[dict[str, Tensor]], stage: Stage, folder: Path, loss: Loss, *,
    steps: int, batch_size: int, learning_rate: float, seed: int, weight_decay: float = 0.0, warmup_steps: int = 0,
) -> None:  # fmt: skip
    """Train a model in place, with AdamW and a cosine schedule; a killed run goes on from ``folder``.

    Args:
        rows: One dictionary of tensors a sequence, all of one length, as the loss wants them.
        folder: Where optimizer states are kept during training.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=learning_rate,
        lr_scheduler_type="cosine", warmup_steps=warmup_steps, weight_decay=weight_decay, adam_beta2=0.98,
        max_grad_norm=1.0, seed=seed, data_seed=seed, bf16=bfloat16_is_fast(device), use_cpu=device.type == "cpu",
        save_strategy="steps", save_steps=200, save_total_limit=1, logging_steps=25, report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False, remove_unused_columns=False,
    )  # fmt: skip
    trainer = _Trainer(model=model, args=arguments, train_dataset=list(rows), callbacks=[_Watch(stage)])
    trainer.own_loss = loss
    trainer.pop_callback(PrinterCallback)
    unfinished = any(folder.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=unfinished)
