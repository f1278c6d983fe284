"""Reshaped spectra against their definition: float64, exact decompositions, one component at a time."""

import pytest
import torch
from excise.editing.numerics.spectrum import Components, factors, leading_components, reshaped

Q = 5


def _matrix(rows=12, columns=9, seed=0):
    """A matrix whose singular values fall by half each time."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(rows, min(rows, columns), generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, min(rows, columns), generator=generator, dtype=torch.float64))
    return (left * 0.5 ** torch.arange(min(rows, columns))) @ right.mT


def _exact(matrix, count=Q):
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    return Components(left[:, :count], sizes[:count], right.mT[:, :count])


def _by_definition(matrix, basis, rule, sides):
    """Each component on its own, first on the inputs, then on the outputs."""
    relative = [float(size / basis.sizes[-1]) for size in basis.sizes]
    keep = {"soft": lambda s: 1 / s, "quadratic": lambda s: 1 / s**2, "hard": lambda s: 0.0}[rule]
    if sides in ("both", "inputs"):
        parts = [torch.outer(matrix @ v, v) for v in basis.right.mT]
        matrix = matrix - sum((1 - keep(s)) * part for s, part in zip(relative, parts, strict=True))
    if sides in ("both", "outputs"):
        parts = [torch.outer(u, u @ matrix) for u in basis.left.mT]
        matrix = matrix - sum((1 - keep(s)) * part for s, part in zip(relative, parts, strict=True))
    return matrix


@pytest.mark.parametrize("rule", ["soft", "quadratic", "hard"])
@pytest.mark.parametrize("sides", ["both", "inputs", "outputs"])
@pytest.mark.parametrize("of", ["itself", "another"])
def test_a_matrix_is_reshaped_as_the_definition_says(rule, sides, of):
    matrix = _matrix()
    basis = _exact(matrix if of == "itself" else _matrix(seed=1))
    wanted = _by_definition(matrix, basis, rule, sides)
    assert torch.allclose(reshaped(matrix, basis, rule, sides), wanted, atol=1e-12)
    assert (wanted - matrix).norm() > 0.1 * matrix.norm(), "something to make smaller"
    turned = Components(basis.right, basis.sizes, basis.left)
    assert torch.allclose(reshaped(matrix.mT, turned, rule, sides, inputs_first=True), wanted.mT, atol=1e-12)


@pytest.mark.parametrize(("sides", "power"), [("inputs", 0), ("outputs", 0), ("both", -1)])
def test_soft_flattens_the_leading_spectrum_on_one_side_and_inverts_it_on_both(sides, power):
    matrix = _matrix()
    sizes = torch.linalg.svdvals(matrix)
    last = sizes[Q - 1]
    wanted = torch.cat([last * (sizes[:Q] / last) ** power, sizes[Q:]])
    found = torch.linalg.svdvals(reshaped(matrix, _exact(matrix), "soft", sides))
    assert torch.allclose(found, wanted.sort(descending=True).values, atol=1e-12)
    assert found.max() < 0.1 * sizes.max()


def test_hard_leaves_the_tail_alone():
    matrix = _matrix()
    left = reshaped(matrix, _exact(matrix), "hard")
    assert torch.allclose(torch.linalg.svdvals(left)[: 9 - Q], torch.linalg.svdvals(matrix)[Q:], atol=1e-12)
    assert (left @ _exact(matrix).right).norm() < 1e-12 < 0.5 < (matrix @ _exact(matrix).right).norm()


def test_the_randomized_components_are_the_exact_ones_and_change_no_random_state():
    matrix = _matrix(40, 30)
    state = torch.random.get_rng_state()
    found = leading_components(matrix, Q, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    exact = _exact(matrix)
    assert torch.allclose(found.sizes, exact.sizes, rtol=1e-3)
    assert torch.allclose(
        reshaped(matrix, found, "soft"), reshaped(matrix, exact, "soft"), atol=1e-3 * float(matrix.norm())
    )
    again, other = leading_components(matrix, Q, seed=3), leading_components(matrix, Q, seed=4)
    assert torch.equal(found.right, again.right) and not torch.equal(found.right, other.right)
    assert leading_components(matrix, 99, seed=0).sizes.shape == (30,), "no more than there are"


def test_rounding_is_no_component_and_a_stack_may_hold_zeros():
    """A gradient of few tokens has few components: the smallest real one stands for q."""
    thin = _matrix()[:, :3] @ torch.randn(3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stack = torch.stack([thin, torch.zeros_like(thin)])
    basis = leading_components(stack, Q, seed=0)
    assert basis.real().sum(-1).tolist() == [3, 0]
    found = reshaped(stack, basis, "soft")
    assert torch.isfinite(found).all() and not found[1].any()
    sizes = torch.linalg.svdvals(thin)[:3]
    assert torch.allclose(torch.linalg.svdvals(found[0])[:3].sort().values, (sizes[2] ** 2 / sizes), rtol=1e-6)
    assert factors(basis, "hard")[0].tolist() == [0, 0, 0, 1, 1]
