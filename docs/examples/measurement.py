"""A new measurement: one function and one row. Here: how long replies are.

python docs/examples/measurement.py
"""

from dataclasses import replace

import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.eval.measurements.table import MEASUREMENTS, MeasurementKind
from excise.eval.model_under_test import EvalSettings, ModelUnderTest
from excise.eval.statistics import Scores


def reply_length(subject: ModelUnderTest) -> list[Scores]:
    """Tokens of a greedy reply. An edit should leave it as it was, so ``better`` is "base"."""
    found = []
    for split in ("concept", "neutral"):
        # Replies are shared with every other measurement that reads them.
        replies = subject.replies(split)
        if replies:
            ids = tuple(prompt.id for prompt in subject.prompts(split))
            lengths = tuple(float(len(reply.ids)) for reply in replies)
            found.append(Scores("reply_length", split, "tokens", "base", ids, lengths, weights=(1.0,) * len(ids)))
    return found


MEASUREMENTS["reply_length"] = MeasurementKind("tokens of a greedy reply", reply_length)

concept = load_concept("builtin:declining")
concept = replace(concept, prompts=concept.prompts[:8] + concept.prompts[-8:])
loaded = load_model(find_model("builtin:testbed"), torch.device("cpu"), torch.float32)
subject = ModelUnderTest(loaded.model, loaded.tokenizer, concept, EvalSettings(max_new_tokens=24))
for scores in MEASUREMENTS["reply_length"].scores(subject):
    low, high = scores.interval()
    print(f"{scores.split}: {scores.value():.1f} [{low:.1f}, {high:.1f}] tokens, n = {len(scores.ids)}")
    assert 0 < scores.value() <= 24
