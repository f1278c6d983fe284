"""Edits tried on a model in memory, one after the other, each written from the original weights.

Adding and subtracting would leave rounding behind, so nothing is ever subtracted: every try, and the end, is computed
from the stored bits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EditError
from .base import Plan, WeightEdit, as_matrices, merge_changes
from .changes import Change

Originals = Callable[[str], Tensor]
"""The original values of a parameter by its name in memory, in stored type and on the CPU."""


class EditsInPlace:
    """Applies edits to a model in memory; ``restore`` gives it its original weights again, bit for bit."""

    def __init__(self, model: Any, config: dict[str, Any], originals: Originals):
        """Nothing is changed yet.

        Args:
            model: A causal language model with the parameter names of transformers.
            config: The content of the model's ``config.json``.
            originals: Reads original values; they may have another floating-point type than the model, as a checkpoint in
                bfloat16 has that is computed in float32. Edited values are rounded to that type first, as an export does.
        """
        self.model, self.config, self.originals = model, config, originals
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())
        self.edited: set[str] = set()
        self._tied: tuple[nn.Module, nn.Parameter] | None = None

    @torch.no_grad()
    def apply(self, edit: WeightEdit) -> list[Change]:
        """Replace whatever edit is applied by this one, as computed from the original weights.

        Returns:
            One record for each tensor; an edit may change none.

        Raises:
            EditError: The edit makes a weight NaN or infinite.
        """
        plan = edit.plan(self.config, list(self.parameters))
        self._untie(plan)
        self._restore(self.edited - set(plan.declared))
        changes = []
        for tensor in plan.tensors:
            self.edited.add(tensor.name)
            original, parts = self.originals(tensor.name), []
            targets = as_matrices(self.parameters[tensor.name].detach())
            for index, (source, target) in enumerate(zip(as_matrices(original), targets, strict=True)):

                def rows(start: int, stop: int, matrix: Tensor = source) -> Tensor:
                    return matrix[start:stop]

                stream = tensor.stream(index, len(source), rows, self.originals)
                target.copy_(torch.cat(list(stream)))
                parts.append(stream.change())
            changes.append(merge_changes(tensor.name, parts))
        return changes

    @torch.no_grad()
    def restore(self) -> None:
        """Give every edited weight its original values.

        Raises:
            EditError: A weight differs from them afterwards.
        """
        self._restore(set(self.edited))
        if self._tied is not None:
            module, weight = self._tied
            module.weight, self._tied = weight, None

    def _restore(self, names: set[str]) -> None:
        for name in sorted(names):
            parameter, original = self.parameters[name], self.originals(name)
            parameter.copy_(original)
            if not torch.equal(parameter.cpu(), original.to(parameter.dtype)):
                raise EditError(f"{name} could not be restored to its old value; load the model again")
            self.edited.discard(name)

    def _untie(self, plan: Plan) -> None:
        """Where an edit gives the unembedding a tensor of its own, the model in memory has one as long as it lasts."""
        if plan.untied and self._tied is None:
            module = self.model.get_output_embeddings()
            self._tied = module, module.weight
            module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)


@contextmanager
def edits_in_place(model: Any, config: dict[str, Any], originals: Originals) -> Iterator[EditsInPlace]:
    """Try edits while the context lasts; afterwards the model is the original again, bit for bit.

    Raises:
        EditError: A weight could not be restored.

    Example:
        >>> with edits_in_place(model, config, originals) as tries:  # doctest: +SKIP
        ...     for strength in (0.5, 1.0):
        ...         tries.apply(scaled(edit, strength))
        ...         print(strength, divergence_of(model))
    """
    tries = EditsInPlace(model, config, originals)
    try:
        yield tries
    finally:
        tries.restore()
