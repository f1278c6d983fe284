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
from torch.autograd.function import once_differentiable

from ..architectures import residual_width
from ..hooks.residual_stream import decoder_layers, first
from ..modules import decoder_of, is_conv1d
from ..numerics.wide import as_given
from ..wiring.row import Architecture
from .low_rank_layer import watched
from .low_rank_products import Updated, multiplied_together, products


class ParallelAdapters:
    """Parameters of all attackers, and the assignment of a batch's rows to attackers."""

    def __init__(self, count: int):
        self.count = count
        self.assigned: Sequence[int] = (0,)
        """Attackers whose rows a batch holds, in this order, with the same number of rows each."""
        self.tokens: Sequence[int] | None = None
        """Where a batch is one packed row: how many tokens of it each of them has, in this order."""
        self.owned: list[list[nn.Parameter]] = [[] for _ in range(count)]
        self.ranks: Sequence[int] = ()
        """Of each attacker's low-rank updates; empty of attackers that have none."""
        self.prefix = 0
        """Number of tokens in front of every row whose embeddings are the attackers' parameters."""

    def ends(self, attackers: Sequence[int], dtype: torch.dtype) -> set[int]:
        """Of some attackers that share a packed row, the places of those that end what is multiplied together there."""
        if not self.ranks:
            return set()
        return {group[-1] for group in multiplied_together(dtype, [self.ranks[place] for place in attackers])}

    @contextmanager
    def only(self, attacker: int) -> Iterator[None]:
        """Assign all rows to one attacker while the context lasts."""
        with self.sharing((attacker,)):
            yield

    @contextmanager
    def sharing(self, attackers: Sequence[int], tokens: Sequence[int] | None = None) -> Iterator[None]:
        """Assign rows to these attackers while the context lasts, or so many tokens of one packed row to each."""
        before, self.assigned, self.tokens = (self.assigned, self.tokens), attackers, tokens
        try:
            yield
        finally:
            self.assigned, self.tokens = before

    def counts(self, rows: int, positions: int) -> list[int]:
        """Positions of each assigned attacker in a batch of so many rows and positions."""
        if self.tokens is None:
            self._check(rows)
            return [positions // len(self.assigned)] * len(self.assigned)
        if sum(self.tokens) != positions:
            raise ValueError(f"a packed row of {positions} tokens, of which attackers are given {sum(self.tokens)}")
        return list(self.tokens)

    def by_position(self, batch: Tensor) -> Tensor:
        """Of every position of a batch [rows, length, d] its attacker's place among the assigned [rows, length]."""
        rows, length = batch.shape[:2]
        counts = torch.tensor(self.counts(rows, rows * length), device=batch.device)
        return torch.repeat_interleave(counts, output_size=rows * length).view(rows, length)

    def _check(self, rows: int) -> None:
        if rows % len(self.assigned):
            raise ValueError(f"{rows} rows cannot be shared equally by {len(self.assigned)} attackers")

    def new_parameters(
        self, shapes: Sequence[Sequence[int]], seeds: Sequence[int], spread: float, device: torch.device
    ) -> list[nn.Parameter]:
        """Make a new fp32 parameter for each attacker: normal values times ``spread``, from the attacker's seed."""
        made = []
        for attacker, (shape, seed) in enumerate(zip(shapes, seeds, strict=True)):
            # A seed for each parameter of each attacker: an attacker starts the same whoever is trained beside it.
            generator = torch.Generator().manual_seed(1000 * seed + len(self.owned[attacker]))
            # Drawn on the processor, so that an attacker starts the same on every device.
            made.append(nn.Parameter((spread * torch.randn(*shape, generator=generator)).to(device)))
            self.owned[attacker].append(made[-1])
        return made

    def assigned_parameters(self, values: Sequence[Tensor], rows: int) -> Tensor:
        """Parameters of the assigned attackers [attackers, ...], for a batch of ``rows`` rows; zeros fill up those
        of lower rank."""
        self._check(rows)
        return nn.utils.rnn.pad_sequence([values[attacker] for attacker in self.assigned], batch_first=True)

    def by_row(self, values: Sequence[Tensor], rows: int) -> Tensor:
        """The parameter that each row uses [rows, ...]."""
        return self.assigned_parameters(values, rows).repeat_interleave(rows // len(self.assigned), 0)


class SideBySide(nn.Module):
    """A frozen linear module with a low-rank update for each attacker."""

    def __init__(
        self, inner: nn.Module, attackers: ParallelAdapters, ranks: Sequence[int], scale: float, seeds: Sequence[int]
    ):
        super().__init__()
        self.inner, self.attackers, self.scale = inner, attackers, scale
        width_in, width_out = linear_widths(inner)
        device = next(inner.parameters()).device
        downs, ups = [(rank, width_in) for rank in ranks], [(width_out, rank) for rank in ranks]
        self.down = nn.ParameterList(attackers.new_parameters(downs, seeds, width_in**-0.5, device))
        # As in LoRA, one factor starts at 0, so that an attacker starts as the base model.
        self.up = nn.ParameterList(attackers.new_parameters(ups, seeds, 0.0, device))

    def forward(self, x: Tensor) -> Tensor:
        part = self.plain_part(x)
        if part is not None:
            return products(x, [part])[0]
        frozen: Tensor = self.inner(x)
        if x.device.type == "cpu":
            places, counts = self.attackers.assigned, self.attackers.counts(len(x), x.numel() // x.shape[-1])
            factors = [*(self.down[place] for place in places), *(self.up[place] for place in places)]
            with as_given(x.device):
                return _Updated.apply(x, frozen, counts, self.scale, *factors)
        # Devices take longer to begin a product than for padding, so all attackers share one.
        down = self.attackers.assigned_parameters(list(self.down), len(x))
        up = self.attackers.assigned_parameters([one.mT for one in self.up], len(x)).mT
        lowered = torch.bmm(x.reshape(len(down), -1, x.shape[-1]).to(down.dtype), down.mT)
        grouped = frozen.reshape(len(up), -1, frozen.shape[-1]).to(up.dtype)
        # Summed in the update's fp32 and rounded to the model's dtype once.
        return torch.baddbmm(grouped, lowered, up.mT, alpha=self.scale).to(frozen.dtype).view_as(frozen)

    def plain_part(self, x: Tensor) -> Updated | None:
        """On a processor frozen weight and updates, a piece of the positions for each attacker, if there is nothing else."""
        inner: Any = self.inner
        plain = type(inner) is nn.Linear and not watched(inner) and x.device.type == "cpu"
        if not plain or inner.weight.dtype != x.dtype:
            return None
        places, counts = self.attackers.assigned, self.attackers.counts(len(x), x.numel() // x.shape[-1])
        downs, ups = [self.down[place] for place in places], [self.up[place] for place in places]
        return Updated(inner.weight, inner.bias, downs, ups, self.scale, counts)


class _Updated(torch.autograd.Function):
    """A frozen layer's output with the low-rank updates of pieces of its positions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: Tensor, counts: Sequence[int], scale: float, *factors: Tensor) -> Tensor:
        """``factors`` are all down-projections [rank, in], then all up-projections [out, rank]."""
        kind, downs, ups = factors[0].dtype, *_halves(factors)
        flat = x.reshape(-1, x.shape[-1]).to(kind)
        out = frozen.reshape(len(flat), -1).to(kind, copy=True)
        lowered = []
        for below, above, down, up in zip(flat.split(counts), out.split(counts), downs, ups, strict=True):
            # A narrow factor stands on the left: processors multiply in that order up to four times faster.
            lowered.append(down @ below.mT)
            above.addmm_(lowered[-1].mT, up.mT, alpha=scale)
        ctx.save_for_backward(x, *lowered, *factors)
        ctx.counts, ctx.scale = counts, scale
        return out.to(frozen.dtype).view_as(frozen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, *others = ctx.saved_tensors
        lowered, factors = others[: len(ctx.counts)], others[len(ctx.counts) :]
        kind, downs, ups = factors[0].dtype, *_halves(factors)
        flat, above = x.reshape(-1, x.shape[-1]).to(kind), gradient.reshape(-1, gradient.shape[-1]).to(kind)
        wanted, below, of_downs, of_ups = ctx.needs_input_grad[0], torch.zeros_like(flat), [], []
        pieces = (one.split(ctx.counts) for one in (flat, above, below))
        with as_given(x.device):
            for some, reaches, goes, read, down, up in zip(*pieces, lowered, downs, ups, strict=True):
                low = (up.mT @ reaches.mT).mul_(ctx.scale)
                of_downs.append(low @ some)
                of_ups.append((read @ reaches).mT.contiguous().mul_(ctx.scale))
                if wanted:
                    goes.addmm_(low.mT, down)
        of_x = below.to(x.dtype).view_as(x) if wanted else None
        return of_x, gradient if ctx.needs_input_grad[1] else None, None, None, *of_downs, *of_ups


def _halves(factors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return factors[: len(factors) // 2], factors[len(factors) // 2 :]


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
    model: nn.Module, modules: Sequence[str], rank: int | Sequence[int], scale: float, seeds: Sequence[int]
) -> Iterator[ParallelAdapters]:
    """Train low-rank adapters, one per attacker, on the named linear modules; the base weights do not change.

    Args:
        rank: Of all attackers, or of each.
        scale: What updates are multiplied by: LoRA's alpha over its rank.
    """
    attackers, inner = ParallelAdapters(len(seeds)), {}
    ranks = attackers.ranks = [rank] * len(seeds) if isinstance(rank, int) else rank
    with _frozen(model):
        try:
            for name in modules:
                inner[name] = model.get_submodule(name)
                model.set_submodule(name, SideBySide(inner[name], attackers, ranks, scale, seeds))
            yield attackers
        finally:
            for name, module in inner.items():
                model.set_submodule(name, module)


@contextmanager
def soft_prompt_attackers(model: Any, tokens: int, seeds: Sequence[int]) -> Iterator[ParallelAdapters]:
    """Train soft prompts: each attacker's parameters replace the embeddings at positions 0 to ``tokens`` - 1.

    Where a decoder is told positions, these count: in a packed row each sequence has its own, and what is read on from a
    cache has none of them.
    """
    attackers = ParallelAdapters(len(seeds))
    attackers.prefix = tokens
    embedding = model.get_input_embeddings()
    # Soft prompts start as large as the embeddings that they stand among.
    spread = float(embedding.weight.detach().float().std()) * embedding_scale(model)
    shapes = [(tokens, embedding.weight.shape[1])] * len(seeds)
    values = attackers.new_parameters(shapes, seeds, spread, embedding.weight.device)
    told: list[Tensor | None] = [None]

    def note(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        told[0] = kwargs.get("position_ids")

    def put(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        positions = told[0]
        if positions is None:
            return torch.cat([attackers.by_row(values, len(output)).to(output), output[:, tokens:]], 1)
        table = torch.cat([values[place] for place in attackers.assigned])
        rows = attackers.by_position(output) * tokens + positions.clamp(max=tokens - 1)
        return torch.where((positions < tokens)[..., None], nn.functional.embedding(rows, table).to(output), output)

    handle = decoder_of(model).register_forward_pre_hook(note, with_kwargs=True)
    try:
        with _frozen(model), _hooked(embedding, put):
            yield attackers
    finally:
        handle.remove()


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
    values = attackers.new_parameters([(residual_width(config.to_dict()),)] * len(seeds), seeds, 1e-3, device)

    def add(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = first(output)
        if attackers.tokens is None:
            added = attackers.by_row(values, len(hidden))[:, None]
        else:
            added = torch.stack([values[place] for place in attackers.assigned])[attackers.by_position(hidden)]
        changed = hidden + added.to(hidden)
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
