"""Small trainings that several tests of the trainer share."""

import torch
from excise.editing.architectures import ARCHITECTURES
from excise.editing.training.adapters import AdapterShape, adapter_modules, attach
from excise.editing.training.soft_targets import keep_top
from excise.recipes.elm.batches import TrainingSequence
from helpers import make_pico


class Stage:
    step = 0

    def __init__(self):
        self.seen = []

    def advance(self, count, **metrics):
        self.step += count
        self.seen.append(metrics)


def lessons(count=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        length = 4 + number % 5
        ids = tuple(torch.randint(3, 96, (length,), generator=generator).tolist())
        log_p = torch.randn(length - 1, 96, generator=generator).log_softmax(-1)
        weights = torch.rand(length - 1, generator=generator)
        terms = torch.randint(0, 3, (length - 1,), generator=generator)
        made.append(TrainingSequence(ids, keep_top(log_p, 20), weights, terms))
    return made


def adapted():
    model = make_pico("llama")
    return attach(model, AdapterShape(2, 4.0, adapter_modules(model, ARCHITECTURES["llama"], range(2))), seed=0)


def trained_weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
