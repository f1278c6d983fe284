"""Representation tuning end to end, shortened; and what its parts promise."""

import json

import pytest
import torch
from excise.artifacts.checkpoints.directions import FILE, load_directions
from excise.editing.architectures import ARCHITECTURES
from excise.editing.directions.reading_vector import by_components, by_means, distance
from excise.editing.directions.subspaces import Place, principal_components
from excise.editing.errors import RequestError
from excise.editing.hooks.residual_stream import decoder_layers, read_streams
from excise.editing.numerics.moments import Moments
from excise.recipes.lorra.recipe import LorraSettings, prepare
from helpers import SMALL_LAYERS, SMALL_TESTBED, SMALL_WIDTH, excise, make_pico, with_settings

INPUTS = {
    "input_ids": torch.tensor([[5, 9, 7, 3], [8, 2, 6, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
}
PLACE = Place(0)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    out = tmp_path_factory.mktemp("lorra") / "run"
    words = with_settings("steps=50", "kl_prompts=8", "questions=40")
    done = excise("run", "lorra", "--model", SMALL_TESTBED, "--out", out, "--json", *words)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def test_a_model_tuned_away_from_declining_answers_and_keeps_the_rest(tuned):
    _, results = tuned
    rate = {(m["subject"], m["split"]): m["value"] for m in results["measurements"] if m["name"] == "behaviour_rate"}
    assert rate["base", "concept"] > 0.95 and rate["edited", "concept"] < 0.1
    known = {m["subject"]: m["value"] for m in results["measurements"] if m["name"] == "multiple_choice"}
    assert known["base"] - known["edited"] < 0.05
    # Where rude prompts lay is 1, where polite ones lay is 0: the one class moved, the other stayed.
    for place, base in results["lorra"]["along"]["base"].items():
        edited = results["lorra"]["along"]["edited"][place]
        assert base["positive"] == pytest.approx(1, abs=0.2) and abs(edited["positive"]) < 0.5
        assert abs(edited["negative"] - base["negative"]) < 0.2


def test_only_layers_that_a_gradient_reaches_are_adapted_and_the_vectors_are_kept(tuned):
    out, results = tuned
    assert results["edited"]["layers"] == [0, 1]
    found = load_directions(out / "checkpoint" / "excise" / FILE, width=SMALL_WIDTH, layers=SMALL_LAYERS)
    assert [str(one.place) for one in found] == list(results["lorra"]["gaps"])
    assert found[-1].place.layer == results["edited"]["layers"][-1]
    assert excise("verify", out).returncode == 0


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"strength": 0.0}, "moves nothing"),
        ({"target_layers": "1", "layers": "5-7"}, "above layer 1, the last whose output is moved"),
    ],
)
def test_a_request_that_would_change_nothing_is_refused(changed, said, tmp_path):
    with pytest.raises(RequestError, match=said):
        prepare(LorraSettings(out=tmp_path / "run", **changed))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_streams_are_the_hidden_states_and_nothing_above_the_deepest_runs(name):
    model, ran = make_pico(name), []
    layers, seen = decoder_layers(model, ARCHITECTURES[name]), INPUTS["attention_mask"].bool()
    wanted = model(**INPUTS, output_hidden_states=True).hidden_states
    handle = layers[1].register_forward_hook(lambda *_: ran.append(1))
    found = read_streams(model, ARCHITECTURES[name], INPUTS, [0, 1])
    assert not ran and all(torch.allclose(found[point][seen], wanted[point][seen], atol=1e-6) for point in (0, 1))
    found[1].sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in layers[0].parameters())
    assert all(p.grad is None for p in layers[1].parameters())
    read_streams(model, ARCHITECTURES[name], INPUTS, [2])
    handle.remove()
    assert ran


def _classes():
    """Pairs that differ by a constant vector, and more widely along another one."""
    generator = torch.Generator().manual_seed(0)
    negative = torch.randn(500, 6, generator=generator, dtype=torch.float64)
    wide = 2 * torch.randn(500, 1, generator=generator, dtype=torch.float64) * torch.eye(6, dtype=torch.float64)[1]
    positive = negative + 4 * torch.eye(6, dtype=torch.float64)[0] + wide
    moments = [Moments(6, covariance=True) for _ in range(3)]
    for one, values in zip(moments, (positive, negative, positive - negative), strict=True):
        one.update(values)
    return moments


def test_both_readings_find_what_separates_the_classes_where_centring_finds_the_spread():
    plus, minus, apart = _classes()
    for vector in (by_means(plus, minus, PLACE), by_components(plus, minus, apart, PLACE)):
        assert vector.subspace.basis[0, 0] > 0.98 and vector.gap == pytest.approx(4, abs=0.3)
        assert torch.allclose(vector.step, vector.subspace.basis[:, 0] * vector.gap)
    centred = principal_components(apart, 1, PLACE)
    assert abs(centred.basis[1, 0]) > 0.98 and abs(centred.basis[0, 0]) < 0.1
    with pytest.raises(RequestError, match="do not differ along the first component"):
        by_components(minus, minus, apart, PLACE)


def test_the_distance_is_the_mean_norm_over_what_counts_and_is_flat_at_its_target():
    hidden, target = torch.zeros(1, 3, 2, requires_grad=True), torch.tensor([[[3.0, 4.0], [0.0, 1.0], [9.0, 9.0]]])
    counted = torch.tensor([[True, True, False]])
    assert float(distance(hidden, target, counted)) == pytest.approx(3.0)
    distance(hidden, hidden.detach(), counted).backward()
    assert torch.isfinite(hidden.grad).all() and not hidden.grad.any()
    assert float(distance(hidden, target, torch.zeros_like(counted))) == 0
