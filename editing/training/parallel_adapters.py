"""Several independent attackers on one frozen model, trained in the same forward.

Each row of a batch belongs to one attacker and uses only that attacker's parameters. The rows of an attacker are
consecutive, and every attacker has the same number of rows, so that one batched matrix product serves all attackers.
The frozen model's work is shared.

There are three kinds of attackers: low-rank adapters (Hu et al. 2021), soft prompts (Lester et al. 2021) and one vector
added to the residual stream (a universal latent perturbation).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import residual_width
from ..hooks.residual_stream import decoder_layers, first
from ..modules import is_conv1d
from ..wiring.row import Architecture


class ParallelAdapters:
    """Parameters of all attackers, and the assignment of a batch's rows to attackers."""

    def __init__(self, count: int):
        self.count = count
        self.assigned: Sequence[int] = (0,)
        """Attackers whose rows a batch holds, in this order, with the same number of rows each."""
        self.owned: list[list[nn.Parameter]] = [[] for _ in range(count)]
        self.prefix = 0
        """Number of tokens in front of every row whose embeddings are the attackers' parameters."""

    @contextmanager
    def only(self, attacker: int) -> Iterator[None]:
        """Assign all rows to one attacker while the context lasts."""
        before, self.assigned = self.assigned, (attacker,)
        try:
            yield
        finally:
            self.assigned = before

    def new_parameters(
        self, shape: Sequence[int], seeds: Sequence[int], spread: float, device: torch.device
    ) -> list[nn.Parameter]:
        """Make a new fp32 parameter for each attacker: normal values times ``spread``, from the attacker's seed."""
        made = []
        for attacker, seed in enumerate(seeds):
            # A seed for each parameter of each attacker: an attacker starts the same whoever is trained beside it.
            generator = torch.Generator().manual_seed(1000 * seed + len(self.owned[attacker]))
            # Drawn on the processor, so that an attacker starts the same on every device.
            made.append(nn.Parameter((spread * torch.randn(*shape, generator=generator)).to(device)))
            self.owned[attacker].append(made[-1])
        return made

    def assigned_parameters(self, values: Sequence[nn.Parameter], rows: int) -> Tensor:
        """Parameters of the assigned attackers [attackers, ...], for a batch of ``rows`` rows."""
        if rows % len(self.assigned):
            raise ValueError(f"{rows} rows cannot be shared equally by {len(self.assigned)} attackers")
        return torch.stack([values[attacker] for attacker in self.assigned])

    def by_row(self, values: Sequence[nn.Parameter], rows: int) -> Tensor:
        """The parameter that each row uses [rows, ...]."""
        return self.assigned_parameters(values, rows).repeat_interleave(rows // len(self.assigned), 0)


class SideBySide(nn.Module):
    """A frozen linear module with a low-rank update for each attacker."""

    def __init__(self, inner: nn.Module, attackers: ParallelAdapters, rank: int, alpha: float, seeds: Sequence[int]):
        super().__init__()
        self.inner, self.attackers, self.scale = inner, attackers, alpha / rank
        width_in, width_out = linear_widths(inner)
        device = next(inner.parameters()).device
        self.down = nn.ParameterList(attackers.new_parameters((rank, width_in), seeds, width_in**-0.5, device))
        # As in LoRA, one factor starts at 0, so that an attacker starts as the base model.
        self.up = nn.ParameterList(attackers.new_parameters((width_out, rank), seeds, 0.0, device))

    def forward(self, x: Tensor) -> Tensor:
        frozen: Tensor = self.inner(x)
        down = self.attackers.assigned_parameters(list(self.down), len(x))
        up = self.attackers.assigned_parameters(list(self.up), len(x))
        lowered = torch.bmm(x.reshape(len(down), -1, x.shape[-1]).to(down.dtype), down.mT)
        grouped = frozen.reshape(len(up), -1, frozen.shape[-1]).to(up.dtype)
        # Summed in the update's fp32 and rounded to the model's dtype once.
        return torch.baddbmm(grouped, lowered, up.mT, alpha=self.scale).to(frozen.dtype).view_as(frozen)


def linear_widths(module: nn.Module) -> tuple[int, int]:
    """Input and output width of a linear module, however its weight is laid out."""
    if isinstance(module, SideBySide):
        return linear_widths(module.inner)
    weight: Any = module.weight
    if is_conv1d(module):
        return int(weight.shape[0]), int(weight.shape[1])
    return int(weight.shape[1]), int(weight.shape[0])


@contextmanager
def low_rank_attackers(
    model: nn.Module, modules: Sequence[str], rank: int, alpha: float, seeds: Sequence[int]
) -> Iterator[ParallelAdapters]:
    """Train low-rank adapters, one per attacker, on the named linear modules; the base weights do not change."""
    attackers, inner = ParallelAdapters(len(seeds)), {}
    with _frozen(model):
        try:
            for name in modules:
                inner[name] = model.get_submodule(name)
                model.set_submodule(name, SideBySide(inner[name], attackers, rank, alpha, seeds))
            yield attackers
        finally:
            for name, module in inner.items():
                model.set_submodule(name, module)


@contextmanager
def soft_prompt_attackers(model: Any, tokens: int, seeds: Sequence[int]) -> Iterator[ParallelAdapters]:
    """Train soft prompts: each attacker's parameters replace the first ``tokens`` embeddings of its rows."""
    attackers = ParallelAdapters(len(seeds))
    attackers.prefix = tokens
    embedding = model.get_input_embeddings()
    # Soft prompts start as large as the embeddings that they stand among.
    spread = float(embedding.weight.detach().float().std()) * embedding_scale(model)
    values = attackers.new_parameters((tokens, embedding.weight.shape[1]), seeds, spread, embedding.weight.device)

    def put(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return torch.cat([attackers.by_row(values, len(output)).to(output), output[:, tokens:]], 1)

    with _frozen(model), _hooked(embedding, put):
        yield attackers


@torch.no_grad()
def embedded(model: Any, ids: Tensor) -> Tensor:
    """What the model puts in place of token ids [n], in fp32 [n, d]; Gemma scales its table's rows on the way."""
    # Not called as a module, because a soft prompt's hook would replace it.
    output: Tensor = model.get_input_embeddings().forward(ids.to(model.device))
    return output.float()


def embedding_scale(model: Any) -> float:
    """How much larger than its table's rows a model's embeddings are."""
    table = model.get_input_embeddings().weight.detach()
    ids = torch.arange(min(64, len(table)), device=table.device)
    return float(embedded(model, ids).norm() / table[ids].float().norm())


@contextmanager
def latent_attackers(
    model: nn.Module, row: Architecture, layer: int, seeds: Sequence[int]
) -> Iterator[ParallelAdapters]:
    """Train latent perturbations: each attacker's vector is added to the stream after a layer, at every position."""
    attackers = ParallelAdapters(len(seeds))
    config: Any = model.config
    device = next(model.parameters()).device
    values = attackers.new_parameters((residual_width(config.to_dict()),), seeds, 1e-3, device)

    def add(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = first(output)
        changed = hidden + attackers.by_row(values, len(hidden)).to(hidden)[:, None]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    with _frozen(model), _hooked(decoder_layers(model, row)[layer], add):
        yield attackers


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters of the model while the context lasts."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
