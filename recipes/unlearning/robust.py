"""Options that change which gradient of the forget term is taken, so that less of it is undone by later training.

All of them look at the trained parameters as one vector. The retain term's gradient is never changed.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...artifacts.files.opened import Telling
from ...artifacts.files.tensors import load_safetensors
from ...editing.errors import RequestError
from ..common.examples import sequence_nll
from ..common.trainer import CHECKPOINT, Loss, Terms

MEMORY = 0.9
"""How much of the retain gradient's running mean stays at each step (MUDMAN: 0.9)."""
STORED_EVERY = 50
"""Steps between the states that a killed run goes on from; the trainer stores its own as often."""
Vectors = list[Tensor]
"""One tensor for each trained parameter."""


class RobustOptions(Protocol):
    """The settings that these options read."""

    @property
    def sam(self) -> float: ...
    @property
    def noise(self) -> float: ...
    @property
    def noise_samples(self) -> int: ...
    @property
    def mask(self) -> str: ...
    @property
    def normalize(self) -> bool: ...
    @property
    def adversary(self) -> int: ...
    @property
    def adversary_rate(self) -> float: ...
    @property
    def push(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def batch_size(self) -> int: ...


def is_robust(options: RobustOptions) -> bool:
    """Whether any option is on."""
    return bool(options.sam or options.noise or options.mask != "none" or options.normalize or options.adversary)


def options_of(options: RobustOptions) -> dict[str, Any]:
    """The options that are on, with their values."""
    names = {"adversary": options.adversary, "sam": options.sam, "noise": options.noise, "normalize": options.normalize}
    names |= {"push": options.push}
    found: dict[str, Any] = {name: value for name, value in names.items() if value}
    found |= {"mask": options.mask} if options.mask != "none" else {}
    found |= {"noise_samples": options.noise_samples} if options.noise else {}
    return found | ({"adversary_rate": options.adversary_rate} if options.adversary else {})


def options_in_words(options: RobustOptions) -> str:
    """As a report states them."""
    return ", ".join(
        f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in options_of(options).items()
    )


def vectors_held(options: RobustOptions) -> int:
    """Numbers that are held beside each trained one, its gradient and the optimizer's state."""
    if not is_robust(options):
        return 0
    moved = bool(options.sam or options.noise or options.adversary)
    return 2 + moved + bool(options.adversary) + (options.mask != "none") + 3 * bool(options.noise)


class RobustLoss:
    """A method's loss, whose gradient is replaced as the options say; its value is the method's.

    Each step: an adversary moves along the loss on what is to be forgotten (``adversary``); the forget term's gradient is taken
    there, at the worst point near (``sam``), as a mean over points with noise (``noise``); it is kept only where it agrees with
    the retain gradient (``mask``), and rescaled to the first step's length (``normalize``).
    """

    def __init__(self, options: RobustOptions, loss: Loss, work: Path):
        """Args:
        work: The run's working folder, where the state of the options is kept beside the trainer's.
        """
        self.options, self.loss, self.work = options, loss, work
        self.step = -1
        """Steps before this one; found when the first is taken, because a run may go on from a stored state."""
        self.retain_mean: Vectors = []
        self.rival: Vectors = []
        self.length: Tensor | None = None

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Terms:
        options, trained = self.options, [p for p in model.parameters() if p.requires_grad]
        if batch["forget"] != options.batch_size:
            raise RequestError(
                f"a step of {options.batch_size} pairs does not fit into memory at once, and sam, noise, mask, normalize and"
                " adversary need its whole gradient; lower batch_size, or give shorter texts"
            )
        if self.step < 0:
            self._go_on(trained)
        terms = self.loss(model, batch)
        moved = bool(options.sam or options.noise or options.adversary)
        retain = gradient(terms["retain"], trained, keep=not moved)
        forget = self._moved_gradient(model, batch, trained) if moved else gradient(terms["forget"], trained)
        forget = self._selected(forget, retain)
        self.step += 1
        return {
            "forget": with_gradient(terms["forget"], trained, forget),
            "retain": with_gradient(terms["retain"], trained, retain),
        }

    def _moved_gradient(self, model: nn.Module, batch: dict[str, Any], trained: Sequence[nn.Parameter]) -> Vectors:
        """The forget term's gradient away from where the model is."""
        options = self.options

        def at_current_point() -> Vectors:
            return gradient(self.loss(model, batch)["forget"], trained)

        with put_back(trained):
            if options.adversary:
                self._move_adversary(model, batch, trained)
            if options.sam:
                up = at_current_point()
                add(trained, up, options.sam / max(norm(up), 1e-12))
            if not options.noise:
                return at_current_point()
            generator = torch.Generator().manual_seed(options.seed * 1_000_003 + self.step)
            here, total = [p.detach().clone() for p in trained], [torch.zeros_like(p) for p in trained]
            for _ in range(options.noise_samples):
                noise = [torch.randn(p.shape, generator=generator).to(p) for p in trained]
                assign(trained, here)
                add(trained, noise, options.noise)
                for sum_, one in zip(total, at_current_point(), strict=True):
                    sum_ += one / options.noise_samples
            return total

    def _move_adversary(self, model: nn.Module, batch: dict[str, Any], trained: Sequence[nn.Parameter]) -> None:
        """Put the adversary's parameters in place, one step further down the loss; every N steps it starts from the model."""
        if self.step % self.options.adversary:
            assign(trained, self.rival)
        count = batch["forget"]
        per_token = (sequence_nll(model, batch) / batch["lengths"].to(batch["input_ids"].device))[:count].mean()
        add(trained, gradient(per_token, trained), -self.options.adversary_rate)
        self.rival = [p.detach().clone() for p in trained]

    def _selected(self, forget: Vectors, retain: Vectors) -> Vectors:
        """Where both agree, and as long as at first."""
        if self.options.mask == "sign":
            self.retain_mean = running_mean(self.retain_mean, retain)
            forget = [one * (one.sign() == other.sign()) for one, other in zip(forget, self.retain_mean, strict=True)]
        if self.options.normalize:
            length = norm(forget)
            if self.length is None:
                self.length = torch.tensor(length)
            forget = [one * (float(self.length) / max(length, 1e-12)) for one in forget]
        return forget

    def after_step(self, step: int) -> None:
        """Keep what the next steps need, as often as the trainer keeps its own state."""
        if step % STORED_EVERY:
            return
        from safetensors.torch import save_file

        self._folder.mkdir(exist_ok=True)
        save_file(self._state(), self._file(step))
        # The trainer may be killed before it has stored the same step.
        for old in self._folder.iterdir():
            if old not in (self._file(step), self._file(step - STORED_EVERY)):
                old.unlink()

    def _state(self) -> dict[str, Tensor]:
        state = {"step": torch.tensor(self.step)}
        state |= {f"retain_mean.{place}": one.cpu() for place, one in enumerate(self.retain_mean)}
        state |= {f"rival.{place}": one.cpu() for place, one in enumerate(self.rival)}
        return state | ({} if self.length is None else {"length": self.length})

    def _go_on(self, trained: Sequence[nn.Parameter]) -> None:
        """Where the trainer goes on from: at the start, or from its newest stored state."""
        names = [path.name.removeprefix(CHECKPOINT) for path in (self.work / "training").glob(f"{CHECKPOINT}*")]
        self.step = max((int(name) for name in names if re.fullmatch("[0-9]+", name)), default=0)
        if not self.step:
            return
        again = f"the run cannot go on; remove {self.work.parent} and start it again"
        with Telling(RequestError, again).about(self._file(self.step)):
            state = load_safetensors(self._file(self.step))
        self.length = state.get("length")

        def vectors(kind: str) -> Vectors:
            known = [state[f"{kind}.{place}"] for place in range(len(trained)) if f"{kind}.{place}" in state]
            return [one.to(p) for one, p in zip(known, trained, strict=False)]

        self.retain_mean, self.rival = vectors("retain_mean"), vectors("rival")

    @property
    def _folder(self) -> Path:
        return self.work / "options"

    def _file(self, step: int) -> Path:
        return self._folder / f"{step}.safetensors"


def gradient(value: Tensor, trained: Sequence[nn.Parameter], *, keep: bool = False) -> Vectors:
    """Of a term with respect to each trained parameter; zeros where it has none."""
    if not value.requires_grad:
        return [torch.zeros_like(p) for p in trained]
    parts = torch.autograd.grad(value, trained, retain_graph=keep, allow_unused=True)
    return [torch.zeros_like(p) if part is None else part for p, part in zip(trained, parts, strict=True)]


def with_gradient(value: Tensor, trained: Sequence[nn.Parameter], wanted: Vectors) -> Tensor:
    """The same value with another gradient, for a trainer that goes backward through it as through any loss."""
    parts = [(p * part).sum().to(value.device) for p, part in zip(trained, wanted, strict=True)]
    lever = torch.stack(parts).sum()
    return value.detach() + (lever - lever.detach())


def norm(vectors: Vectors) -> float:
    """Euclidean norm of all of them together."""
    return float(torch.stack([one.float().square().sum().cpu() for one in vectors]).sum().sqrt())


def running_mean(mean: Vectors, new: Vectors) -> Vectors:
    """``m r + (1 - m) g``; from the first gradient on, its sign is what counts."""
    old = mean or [torch.zeros_like(one) for one in new]
    return [MEMORY * one + (1 - MEMORY) * other for one, other in zip(old, new, strict=True)]


@torch.no_grad()
def add(trained: Sequence[nn.Parameter], vectors: Vectors, factor: float) -> None:
    """Move parameters."""
    for parameter, one in zip(trained, vectors, strict=True):
        parameter.add_(one, alpha=factor)


@torch.no_grad()
def assign(trained: Sequence[nn.Parameter], values: Vectors) -> None:
    """Give parameters other values."""
    for parameter, one in zip(trained, values, strict=True):
        parameter.copy_(one)


@contextmanager
def put_back(trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let parameters be moved while the context lasts; afterwards they are what they were, bit for bit."""
    before = [p.detach().clone() for p in trained]
    try:
        yield
    finally:
        assign(trained, before)
