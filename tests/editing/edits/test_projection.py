import pytest
import torch
from excise.editing.edits.projection import BlockwiseEdit, make_projection, orthogonalize
from excise.editing.edits.subspace_removal import Edit
from excise.editing.errors import EditError, RequestError


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _basis(width, rank, seed=1):
    return torch.linalg.qr(_random(width, rank, seed=seed)).Q


WEIGHT, BASIS = _random(24, 40), _basis(24, 2)


def test_output_loses_every_component_along_basis():
    assert (BASIS.T @ WEIGHT).abs().max() > 0.1  # something to lose
    assert (BASIS.T @ orthogonalize(WEIGHT, make_projection(BASIS, 1.0))).abs().max() < 1e-5


def test_the_rest_of_the_output_stays():
    others = torch.linalg.qr(torch.cat([BASIS, _random(24, 22, seed=3)], dim=1)).Q[:, 2:]
    edited = orthogonalize(WEIGHT, make_projection(BASIS, 1.0))
    assert torch.allclose(others.T @ edited, others.T @ WEIGHT, atol=1e-5)


def test_a_second_edit_changes_nothing_and_the_first_did():
    projection = make_projection(BASIS, 1.0)
    once = orthogonalize(WEIGHT, projection)
    assert not torch.allclose(once, WEIGHT, atol=0.1)
    assert torch.allclose(orthogonalize(once, projection), once, atol=1e-5)


def test_half_strength_leaves_half_of_the_component():
    edited = orthogonalize(WEIGHT, make_projection(BASIS, 0.5))
    assert torch.allclose(BASIS.T @ edited, 0.5 * BASIS.T @ WEIGHT, atol=1e-5)


def test_norm_preservation_keeps_columns_and_still_removes():
    edited = orthogonalize(WEIGHT, make_projection(BASIS, 1.0, norm_preserving=True))
    plain = orthogonalize(WEIGHT, make_projection(BASIS, 1.0))
    assert torch.allclose(edited.norm(dim=0), WEIGHT.norm(dim=0), rtol=1e-5)
    assert not torch.allclose(plain.norm(dim=0), WEIGHT.norm(dim=0), rtol=1e-3)
    assert (BASIS.T @ edited).abs().max() < 1e-5


def test_norm_preservation_on_rows_would_put_the_direction_back():
    """The trap of the other axis: with a concentrated direction and heavy-tailed rows most of it returns."""
    direction = torch.zeros(24, 1)
    direction[:3] = torch.tensor([[0.8], [0.5], [0.33166]])
    weight = WEIGHT.clone()
    weight[:3] *= 20
    plain = orthogonalize(weight, make_projection(direction, 1.0))
    on_rows = plain * (weight.norm(dim=1) / plain.norm(dim=1))[:, None]
    assert (direction.T @ on_rows).norm() > 0.05 * (direction.T @ weight).norm()


def test_a_column_inside_the_subspace_is_not_scaled_to_infinity():
    weight = torch.cat([BASIS[:, :1] * 3, WEIGHT], dim=1)
    edited = orthogonalize(weight, make_projection(BASIS, 1.0, norm_preserving=True))
    assert torch.isfinite(edited).all()
    assert edited[:, 0].norm() < 1e-4


def test_behind_a_gain_the_write_reaching_the_stream_loses_the_direction():
    gain = 1 + 0.5 * _random(24, seed=5)
    naive = orthogonalize(WEIGHT, make_projection(BASIS, 1.0))
    assert (BASIS.T @ (gain[:, None] * naive)).norm() > 0.1 * (BASIS.T @ (gain[:, None] * WEIGHT)).norm()
    projection = make_projection(BASIS, 1.0, gain)
    assert projection.form == "conjugate"
    edited = orthogonalize(WEIGHT, projection)
    assert (BASIS.T @ (gain[:, None] * edited)).abs().max() < 1e-4


def test_the_conjugate_form_is_ablation_of_what_reaches_the_stream():
    gain = 1 + 0.5 * _random(24, seed=5)
    edited = gain[:, None] * orthogonalize(WEIGHT, make_projection(BASIS, 1.0, gain))
    stream = gain[:, None] * WEIGHT
    assert torch.allclose(edited, stream - BASIS @ (BASIS.T @ stream), atol=1e-4)


def test_a_gain_near_zero_takes_the_folded_form_and_stays_small():
    gain = 1 + 0.3 * _random(24, seed=5)
    gain[4] = 1e-9
    projection = make_projection(BASIS, 1.0, gain)
    edited = orthogonalize(WEIGHT, projection)
    assert projection.form == "folded"
    assert (BASIS.T @ (gain[:, None] * edited)).abs().max() < 1e-4
    assert edited.abs().max() < 2 * WEIGHT.abs().max()


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("rows_per_block", [1, 5, 1000])
@pytest.mark.parametrize("norm_preserving", [False, True])
def test_blocks_give_what_the_whole_matrix_gives(axis, rows_per_block, norm_preserving):
    stored = WEIGHT.T.contiguous() if axis == -1 else WEIGHT
    projection = make_projection(BASIS, 1.0, norm_preserving=norm_preserving)
    stream = BlockwiseEdit("w", len(stored), axis, lambda a, b: stored[a:b], projection, BASIS, None, rows_per_block)
    edited = torch.cat(list(stream))
    whole = orthogonalize(WEIGHT, projection)
    assert torch.allclose(edited.T if axis == -1 else edited, whole, atol=1e-5)
    change = stream.change()
    assert change.residual < 1e-5
    assert change.relative_change == pytest.approx(float((whole - WEIGHT).norm() / WEIGHT.norm()), rel=1e-3)
    assert change.written == pytest.approx(float((BASIS.T @ WEIGHT).norm() / WEIGHT.norm()), rel=1e-3)


def test_a_nan_weight_is_an_error_that_names_the_tensor():
    weight = WEIGHT.clone()
    weight[3, 3] = float("nan")
    stream = BlockwiseEdit("layers.7.down", 24, -2, lambda a, b: weight[a:b], make_projection(BASIS, 1.0), BASIS)
    with pytest.raises(EditError, match=r"layers\.7\.down"):
        list(stream)


def test_a_basis_that_is_not_orthonormal_is_refused():
    with pytest.raises(RequestError, match="not orthonormal"):
        Edit(2 * BASIS, "llama", (1.0, 1.0))
