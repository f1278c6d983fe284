"""Directions from streamed statistics equal those from all samples at once."""

import dataclasses

import numpy as np
import pytest
import torch
from excise.artifacts.checkpoints.directions import FILE, load_directions, save_directions
from excise.editing.directions.subspaces import (
    Place,
    Subspace,
    least_squares_eraser,
    mass_mean,
    mean_difference,
    principal_components,
    random_directions,
    ridge_probe,
)
from excise.editing.errors import RequestError
from excise.editing.numerics.moments import Moments

PLACE = Place(3, "output")
D = 12


def _classes(count=400, seed=0):
    """Two classes that differ along one axis, under anisotropic noise."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(D, D, generator=generator, dtype=torch.float64)
    noise = torch.randn(2 * count, D, generator=generator, dtype=torch.float64) @ mixing
    labels = torch.arange(2 * count) % 2
    shift = torch.randn(D, generator=generator, dtype=torch.float64)
    return noise + labels[:, None] * shift + 3.0, labels


def _moments(samples):
    moments = Moments(samples.shape[-1], covariance=True)
    for batch in samples.split(37):
        moments.update(batch)
    return moments


@pytest.fixture(scope="module")
def classes():
    samples, labels = _classes()
    return samples, labels, _moments(samples[labels == 1]), _moments(samples[labels == 0])


@pytest.mark.parametrize("centred", [True, False])
def test_components_are_the_exact_eigenvectors(classes, centred):
    samples = classes[0]
    around = samples - samples.mean(0) if centred else samples
    _, values, vectors = torch.linalg.svd(around)
    found = principal_components(_moments(samples), 5, PLACE, centred=centred)
    # The spectrum decays slowly; a randomized decomposition has the later ones wrong.
    cosines = (found.basis.T.double() @ vectors[:5].T).diagonal().abs()
    assert (cosines > 1 - 1e-6).all()
    np.testing.assert_allclose(found.scores, (values[:5] ** 2 / (values**2).sum()).numpy(), rtol=1e-6)


def test_centring_takes_away_the_mean_difference_that_is_looked_for():
    generator = torch.Generator().manual_seed(0)
    mean = torch.eye(D)[0] * 5
    differences = mean + torch.randn(300, D, generator=generator) * torch.tensor([0.1] + [1.0] * (D - 1))
    centred, whole = (
        principal_components(_moments(differences), 1, PLACE, centred=c).basis[:, 0] for c in (True, False)
    )
    assert abs(float(whole[0])) > 0.99 and abs(float(centred[0])) < 0.2


def test_samples_of_one_line_have_one_component():
    line = torch.outer(torch.arange(1.0, 40.0), torch.ones(D))
    assert principal_components(_moments(line), 4, PLACE).names == ("component 0",)


def test_a_mean_difference_is_the_classes_own(classes):
    samples, labels, plus, minus = classes
    found = mean_difference(plus, minus, PLACE)
    expected = samples[labels == 1].mean(0) - samples[labels == 0].mean(0)
    torch.testing.assert_close(found.basis[:, 0] * found.scores[0], expected.float())
    torch.testing.assert_close(found.offset, samples[labels == 0].mean(0).float())


@pytest.mark.parametrize("fitter", [mass_mean, ridge_probe])
def test_whitened_directions_separate_better_than_the_mean_difference(classes, fitter):
    samples, labels, plus, minus = classes

    def separation(direction):
        scores = samples.float() @ direction
        a, b = scores[labels == 1], scores[labels == 0]
        return float((a.mean() - b.mean()).abs() / ((a.var() + b.var()) / 2).sqrt())

    plain = separation(mean_difference(plus, minus, PLACE).basis[:, 0])
    assert separation(fitter(plus, minus, PLACE).basis[:, 0]) > 1.2 * plain


def _erased(samples, subspace):
    left, right = (part.double() for part in subspace.projector())
    return samples - (samples - subspace.offset.double()) @ right @ left.T


@pytest.mark.parametrize("orthogonal", [False, True])
def test_after_erasing_no_linear_classifier_beats_chance(classes, orthogonal):
    samples, labels, plus, minus = classes
    found = least_squares_eraser(plus, minus, PLACE, orthogonal=orthogonal)
    erased = _erased(samples, found)
    centred = labels.double() - labels.double().mean()

    def correlation(x):
        return float(((x - x.mean(0)).T @ centred / len(x)).abs().max())

    assert correlation(erased) < 1e-5 < 0.1 < correlation(samples)
    # The oblique projector moves samples least (in the whitened sense), the orthogonal one less than by chance.
    assert float((erased - samples).norm()) > 0


@pytest.mark.parametrize("orthogonal", [False, True])
def test_erasing_equals_the_library_of_its_authors(classes, orthogonal):
    library = pytest.importorskip(
        "concept_erasure", reason="concept-erasure is not installed; pip install concept-erasure"
    )
    samples, labels, plus, minus = classes
    method = "orth" if orthogonal else "leace"
    eraser = library.LeaceEraser.fit(
        samples, labels, method=method, shrinkage=False, constrain_cov_trace=False, svd_tol=1e-6
    )
    found = least_squares_eraser(plus, minus, PLACE, orthogonal=orthogonal)
    torch.testing.assert_close(_erased(samples, found), eraser(samples), atol=1e-5, rtol=1e-5)


def test_directions_come_back_from_disk_as_they_were(tmp_path, classes):
    _, _, plus, minus = classes
    kept = [
        least_squares_eraser(plus, minus, PLACE).with_provenance({"model": "m", "seed": 1}),
        principal_components(plus, 3, Place(0, "attention")).pick([2, 0]),
    ]
    save_directions(kept, tmp_path / FILE)
    for before, after in zip(kept, load_directions(tmp_path / FILE, width=D, layers=4), strict=True):
        for field in dataclasses.fields(Subspace):
            one, other = getattr(before, field.name), getattr(after, field.name)
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(
    ("wanted", "message"),
    [({"width": 16}, "are of width 12, the model is of width 16"), ({"layers": 2}, "the model has layers 0 to 1")],
)
def test_directions_of_another_model_are_refused(tmp_path, classes, wanted, message):
    save_directions([mean_difference(classes[2], classes[3], PLACE)], tmp_path / FILE)
    with pytest.raises(RequestError, match=message):
        load_directions(tmp_path / FILE, **wanted)


def test_another_file_is_no_directions(tmp_path):
    (tmp_path / FILE).write_bytes(b"nothing of the kind")
    with pytest.raises(RequestError, match="not a whole safetensors file"):
        load_directions(tmp_path / FILE)


@pytest.mark.parametrize(
    ("basis", "message"),
    [
        (torch.ones(D, 2), "not linearly independent"),
        (torch.full((D, 1), float("nan")), "not linearly independent"),
        (torch.eye(3, 4), "4 directions at the output of layer 3 do not fit into a stream of width 3"),
    ],
)
def test_a_basis_that_spans_less_than_it_says_is_refused(basis, message):
    d, k = basis.shape
    with pytest.raises(RequestError, match=message):
        Subspace(PLACE, basis, torch.zeros(d), ("x",) * k, (0.0,) * k, "file")


def test_an_oblique_projector_is_taken_whole_or_not_at_all(classes):
    eraser = least_squares_eraser(classes[2], classes[3], PLACE)
    assert eraser.pick([0]).names == eraser.names
    with pytest.raises(RequestError, match="there is no direction 1"):
        eraser.pick([1])
    with pytest.raises(RequestError, match="one projector"):
        eraser.pick([])


def test_random_directions_are_orthonormal_and_the_seeds_own(classes):
    like = principal_components(classes[2], 3, PLACE)
    one, same, other = (random_directions(like, seed).basis for seed in (1, 1, 2))
    torch.testing.assert_close(one.T @ one, torch.eye(3), atol=1e-5, rtol=0)
    assert torch.equal(one, same) and not torch.equal(one, other)
