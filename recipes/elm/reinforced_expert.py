"""An expert made by training: the model after a short adapter on what is to be forgotten.

Source: Eldan and Russinovich 2023 (arXiv 2310.02238), section 2.1, the reinforced model.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ...artifacts.events import Stage
from ...artifacts.models.load import LoadedModel
from ...editing.architectures import architecture_of, layer_count
from ...editing.edits.fake_quantization import changed_weights
from ...editing.errors import EditError
from ...editing.training.adapters import adapter_shape, attach, detach, learned_factors
from ...eval.concept import Concept
from ..common.examples import Example, completion_loss, cycled
from ..common.packed_training import packed_examples
from ..common.tokens import encode, pieces, text_limit
from ..common.trainer import Schedule, fit
from .request import ElmSettings
from .teacher import ExpertContext

RANK, BATCH, RATE = 8, 8, 1e-3


def reinforced(loaded: LoadedModel, concept: Concept, settings: ElmSettings, stage: Stage, work: Path) -> ExpertContext:
    """Train an expert on the pack's texts and take it off again.

    Returns:
        A context while which the model is the expert; afterwards its weights are what they were, bit for bit.
    """
    config, limit = loaded.model.config.to_dict(), text_limit(loaded.model)
    steps, seed = settings.expert_steps, settings.seed
    layers = range(layer_count(config))
    shape = adapter_shape(loaded.model, architecture_of(config), layers, rank=RANK, alpha=2.0 * RANK)
    rows = [piece for text in concept.forget for piece in pieces(encode(loaded.tokenizer, text.text, True), limit)]
    examples = [Example(row, 1) for row in rows if len(row) > 1]
    if not examples:
        raise EditError(f"no text of concept {concept.ref} has two tokens to train an expert on; give longer ones")
    order = cycled(examples, steps * BATCH, random.Random(f"excise expert {seed}"))
    adapted = attach(loaded.model, shape, seed)
    try:
        schedule = Schedule(steps, BATCH, RATE, seed, beta2=0.999, warmup_steps=min(10, steps // 10), save_every=0)
        with packed_examples(adapted) as collate:
            fit(adapted, order, stage, work / "expert", completion_loss, schedule, collate)
        factors = learned_factors(adapted, shape)
    finally:
        detach(adapted)
    # The trainer leaves the model in training mode.
    loaded.model.eval()

    def taught(name: str, weight: Tensor) -> Tensor:
        if name not in factors:
            return weight
        left, right = (part.to(weight.device) for part in (factors[name].left, factors[name].right))
        return (weight.float() + left @ right).to(weight.dtype)

    weights = {name: loaded.model.get_parameter(name) for name in factors}

    @contextmanager
    def expert() -> Iterator[None]:
        with changed_weights(loaded.model, taught, weights) as changed:
            if changed < len(factors):
                raise EditError(
                    f"the expert's training left {len(factors) - changed} of {len(factors)} weights as they were"
                )
            yield

    return expert
