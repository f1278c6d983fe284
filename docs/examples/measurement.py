"""A new measurement: one function and one row. Here: how long replies are.

python docs/examples/measurement.py
"""

from dataclasses import replace

import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.eval.measurements import MEASUREMENTS, MeasurementKind, OnSplit
from excise.eval.measurements.table import scores_of
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


MEASUREMENTS["reply_length"] = MeasurementKind(
    "tokens of a greedy reply",
    label="length of replies",
    unit="tokens",
    order=175,
    # In the package itself the row names the function instead: scores="reply_length:scores".
    scores=reply_length,
    splits={"concept": OnSplit("base", column="reply length"), "neutral": OnSplit("base")},
)

concept = load_concept("builtin:declining")
concept = replace(concept, prompts=concept.prompts[:8] + concept.prompts[-8:])
loaded = load_model(find_model("builtin:testbed"), torch.device("cpu"), torch.float32)
subject = ModelUnderTest(loaded.model, loaded.tokenizer, concept, EvalSettings(max_new_tokens=24))
for scores in scores_of("reply_length", subject):
    low, high = scores.interval()
    print(f"{scores.split}: {scores.value():.1f} [{low:.1f}, {high:.1f}] tokens, n = {len(scores.ids)}")
    assert 0 < scores.value() <= 24
