"""What a model reads is counted, and a run's stages tell it."""

from collections import Counter

import torch
from excise.artifacts.event_log import read_events
from excise.artifacts.events import Events, count
from excise.editing.hooks.token_counts import DIFFERENTIATED, PADDING, SCORED, TOKENS, count_tokens
from excise.eval.inference.likelihood import pad_right
from helpers import make_pico

ROWS = [(5, 6, 7, 8), (9, 10), (11,)]


def _read(model):
    return model(**pad_right(ROWS, model.device), use_cache=False, logits_to_keep=torch.arange(2, 4))


def test_positions_padding_and_those_with_a_gradient_are_told_apart():
    model, seen = make_pico("llama"), Counter()
    count_tokens(model, lambda name, number: seen.update({name: int(number)}))
    with torch.no_grad():
        _read(model)
    assert seen == {TOKENS: 12, PADDING: 5, SCORED: 6}
    _read(model)
    assert seen == {TOKENS: 24, PADDING: 10, SCORED: 12, DIFFERENTIATED: 12}


@torch.no_grad()
def test_tokens_of_a_cache_are_counted_once():
    model, seen = make_pico("llama"), Counter()
    count_tokens(model, lambda name, number: seen.update({name: int(number)}))
    # The first row is padded on the left; what is generated is not.
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    model.generate(torch.ones_like(mask), attention_mask=mask, min_new_tokens=4, max_new_tokens=4, do_sample=False)
    assert seen[TOKENS] == 2 * 3 + 3 * 2 and seen[PADDING] == 1


def test_the_innermost_stage_tells_what_was_read_in_it(tmp_path):
    model, events = make_pico("llama"), Events(tmp_path / "events.jsonl")
    count_tokens(model, count)
    with torch.no_grad():
        _read(model)
        with events.stage("outer"), events.stage("inner"):
            _read(model)
        with events.stage("nothing"):
            pass
    ends = {
        one["stage"]: one["metrics"] for one in read_events(tmp_path / "events.jsonl") if "seconds" in one["metrics"]
    }
    assert ends["inner"].pop("seconds") >= 0 and ends["inner"] == {TOKENS: 12, PADDING: 5, SCORED: 6}
    assert set(ends["outer"]) == set(ends["nothing"]) == {"seconds"}
