"""Tier 0 on behaviours: prompts in another style, and the direction of a contrast added back."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ....editing.architectures import architecture_of, layer_count
from ....editing.hooks.residual_stream import added, residual_stream
from ....eval.concept import Question
from ....eval.inference.chat import encode_prompt, render_messages
from ....eval.inference.likelihood import pad_left
from ..attack_data import Answers
from ..behaviours.data import BehaviourData, Style
from .weights import as_base

THANKS = "Thank you for your help so far."
GREETING, GREETED = "Hello.", "Hello. How can I help you?"
DEPTHS = (0.25, 0.5, 0.75)
"""Where in the stream the direction is added, in shares of the depth."""
AT_ONCE = 16
"""Prompts of a forward."""


def upper(model: Any, data: BehaviourData) -> Answers:
    """Capital letters."""
    return _asked(model, data, Style(str.upper))


def lower(model: Any, data: BehaviourData) -> Answers:
    """Small letters."""
    return _asked(model, data, Style(str.lower))


def thanks(model: Any, data: BehaviourData) -> Answers:
    """A sentence of thanks first."""
    return _asked(model, data, Style(lambda prompt: f"{THANKS} {prompt}"))


def roles(model: Any, data: BehaviourData) -> Answers:
    """The prompt as a line of a transcript."""
    return _asked(model, data, Style(lambda prompt: f"User: {prompt}\nAssistant:"))


def after_a_turn(model: Any, data: BehaviourData) -> Answers:
    """A turn of small talk before the prompt."""
    return _asked(model, data, Style(lambda prompt: prompt, _behind_a_turn))


def _behind_a_turn(tokenizer: Any, prompt: str) -> str:
    if not tokenizer.chat_template:
        return f"{GREETING}\n{GREETED}\n{prompt}"
    turns = (("user", GREETING), ("assistant", GREETED), ("user", prompt))
    return render_messages(tokenizer, [{"role": role, "content": text} for role, text in turns], reply=True)


def _asked(model: Any, data: BehaviourData, style: Style) -> Answers:
    # Other prompts stand in no other style, so they are not asked again.
    return replace(data, style=style, others=()).ask(model)


def add_direction(model: Any, data: BehaviourData) -> dict[float, Answers]:
    """Add what the base has along the contrast, once, at several layers; the layer that gets furthest counts."""
    row, depth = architecture_of(model.config.to_dict()), layer_count(model.config.to_dict())
    points = sorted({max(1, round(share * depth)) for share in DEPTHS})
    with as_base(model, data):
        steps = _difference(model, data, points)
    answers = {}
    for point, step in zip(points, steps, strict=True):
        with added(model, row, step, point):
            answers[float(point)] = data.ask(model)
    return answers


@torch.no_grad()
def _difference(model: Any, data: BehaviourData, points: Sequence[int]) -> Tensor:
    """Mean of the stream at the last token of positive prompts minus that of negative ones [points, d], fp32."""
    row = architecture_of(model.config.to_dict())
    chat = not isinstance(data.questions[0], Question)
    means = []
    for texts in zip(*data.contrast, strict=True):
        total = torch.zeros(())
        for start in range(0, len(texts), AT_ONCE):
            rows = [encode_prompt(data.tokenizer, text, chat=chat) for text in texts[start : start + AT_ONCE]]
            stream = residual_stream(model, row, pad_left(rows, model.device), points, last=1)
            total = total + stream.float().sum((1, 2)).cpu()
        means.append(total / len(texts))
    return (means[0] - means[1]).to(model.device)
