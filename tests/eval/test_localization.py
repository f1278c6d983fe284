"""Effects of sites are their definitions: exact patching beside a forward written out, estimates beside differences."""

import pytest
import torch
from excise.editing.architectures import architecture_of
from excise.editing.errors import EditError
from excise.editing.hooks.patching import STREAM, Site, patched, sites_of, sites_read
from excise.editing.hooks.unit_scores import rank_correlation
from excise.eval.localization import Effect, Pair, attribution, by_layer, exact, known, window
from helpers import make_pico
from scipy.stats import spearmanr

CLEAN, CORRUPTED = (5, 9, 11, 7, 3, 8), (5, 20, 21, 7, 3, 8)


def _pairs(model):
    """Two pairs of unlike length whose answers the model prefers, each after its own prompt."""
    pairs = []
    for clean, corrupted in ((CLEAN, CORRUPTED), ((4, 30, 6), (4, 31, 6))):
        logits = [model(torch.tensor([row])).logits[0, -1] for row in (clean, corrupted)]
        gap = logits[0] - logits[1]
        places = [at for at, (a, b) in enumerate(zip(clean, corrupted, strict=True)) if a != b]
        span = (places[0], places[-1] + 1)
        pairs.append(Pair(clean, corrupted, span, int(gap.argmax()), int(gap.argmin()), f"subject {len(pairs)}"))
    return pairs


def _metric(model, pair, row):
    logits = model(torch.tensor([row])).logits[0, -1]
    return float(logits[pair.answer] - logits[pair.other])


def _naive(model, row, pairs, *, remove=False):
    """One pair, one site and one group at a time, without padding, by hooks of its own."""
    sums, gaps = {}, 0.0
    for pair in pairs:
        start, source = (pair.clean, pair.corrupted) if remove else (pair.corrupted, pair.clean)
        plain = _metric(model, pair, start)
        gaps += _metric(model, pair, pair.clean) - _metric(model, pair, pair.corrupted)
        for site, module in sites_of(model, row).items():
            kept = []
            handle = module.register_forward_hook(lambda _, __, out, k=kept: k.append(_first(out).clone()))
            model(torch.tensor([source]))
            handle.remove()
            for group, positions in pair.positions().items():

                def put(_, __, out, values=kept[0], positions=tuple(positions)):
                    hidden = _first(out).clone()
                    flat, new = hidden.reshape(-1, hidden.shape[-1]), values.reshape(-1, hidden.shape[-1])
                    flat[list(positions)] = new[list(positions)]
                    hidden = flat.reshape(hidden.shape)
                    return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

                handle = module.register_forward_hook(put)
                moved = _metric(model, pair, start)
                handle.remove()
                change = plain - moved if remove else moved - plain
                sums[site, group] = sums.get((site, group), 0.0) + change
    return {place: value / gaps for place, value in sums.items()}


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def _values(effects):
    return {(effect.site, effect.group): effect.value for effect in effects}


@pytest.mark.parametrize("remove", [False, True], ids=["restored", "removed"])
@torch.no_grad()
def test_exact_effects_are_those_of_one_patched_forward_at_a_time(architecture, remove):
    model = make_pico(architecture)
    row, pairs = architecture_of(model.config.to_dict()), _pairs(model)
    found = _values(exact(model, row, pairs, remove=remove))
    oracle = _naive(model, row, pairs, remove=remove)
    assert found.keys() == oracle.keys()
    assert max(abs(found[place] - oracle[place]) for place in found) < 1e-4
    assert max(map(abs, oracle.values())) > 0.5, "something to find"


def test_the_whole_stream_after_the_last_layer_is_the_whole_answer_and_one_layer_is_less(architecture):
    model = make_pico(architecture)
    row, pairs = architecture_of(model.config.to_dict()), _pairs(model)
    last = max(site.layer for site in sites_of(model, row))
    found = _values(exact(model, row, pairs))
    assert found[Site(last, STREAM), "last"] == pytest.approx(1, abs=1e-4)
    assert found[Site(last, STREAM), "subject"] == pytest.approx(0, abs=1e-4), "nothing reads it after the last layer"
    sublayer = next(site for site in sites_of(model, row) if site.part != STREAM)
    assert abs(found[sublayer, "last"] - 1) > 0.01


def test_estimates_are_the_slope_of_exact_effects(architecture):
    """Toward small changes of the activations, both agree; the estimate of a whole change need not."""
    model = make_pico(architecture)
    row, pair = architecture_of(model.config.to_dict()), _pairs(model)[0]
    estimated, sites = _values(attribution(model, row, [pair])), sites_of(model, row)
    with torch.no_grad():
        kept = {}
        for name in ("clean", "corrupted"):
            with sites_read(sites) as kept[name]:
                model(torch.tensor([getattr(pair, name)]))
        step = 0.004
        gap = _metric(model, pair, pair.clean) - _metric(model, pair, pair.corrupted)
        for site in sites:
            change = kept["clean"][site] - kept["corrupted"][site]
            for group, positions in pair.positions().items():
                where = torch.zeros(1, len(pair.clean), dtype=torch.bool)
                where[0, list(positions)] = True
                ends = []
                for sign in (1, -1):
                    with patched(sites[site], kept["corrupted"][site] + sign * step * change, where):
                        ends.append(_metric(model, pair, pair.corrupted))
                slope = (ends[0] - ends[1]) / (2 * step) / gap
                assert estimated[site, group] == pytest.approx(slope, abs=0.01)


def test_weights_get_no_gradients_and_hooks_are_gone():
    model = make_pico("llama")
    row, pairs = architecture_of(model.config.to_dict()), _pairs(model)
    before = _metric(model, pairs[0], CLEAN)
    attribution(model, row, pairs), exact(model, row, pairs)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert _metric(model, pairs[0], CLEAN) == before
    assert not any(module._forward_hooks for module in model.modules())


def test_pairs_that_the_model_answers_wrongly_are_left_out():
    model = make_pico("llama")
    right = _pairs(model)
    wrong = [Pair(p.clean, p.corrupted, p.subject, p.other, p.answer, p.name) for p in right]
    kept = known(model, [*wrong, *right])
    signs = [_metric(model, p, p.clean) > 0 > _metric(model, p, p.corrupted) for p in right]
    assert kept == [pair for pair, is_known in zip(right, signs, strict=True) if is_known]


def test_a_compiled_model_is_refused():
    model = make_pico("llama")
    sites = sites_of(model, architecture_of(model.config.to_dict()))
    with pytest.raises(EditError, match="hooks do not run"), sites_read(sites):
        pass


def test_the_window_holds_its_share_in_the_fewest_layers():
    effects = [
        Effect(Site(layer, "mlp"), "last", value, None) for layer, value in enumerate([0.1, 0.6, 0.4, -2.0, 0.1])
    ]
    effects.append(Effect(Site(4, STREAM), "last", 9.0, None))
    assert by_layer(effects, 5) == [0.1, 0.6, 0.4, 0.0, 0.1]
    assert (
        window(effects, 5) == (1, 2) and window(effects, 5, share=0.4) == (1, 1) and window(effects, 5, 1.0) == (0, 4)
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_rank_correlation_is_scipys(seed):
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randint(0, 5, (12,), generator=generator).float() for _ in range(2))
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)
