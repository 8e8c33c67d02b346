"""GPTQ: the paper's codes, no worse than rounding and near the best there is, with scales that fit them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from calibration.gptq import BLOCK, _choose_again, _refit_scales, _round_by_columns, _Scaled, factor, gptq
from calibration.rtn import _SHRINK_LEAST, _SHRINK_STEPS, round_to_nearest, search_scales, to_scale_grid
from exporter.errors import InputError
from exporter.quantized import CODE_RANGE, SMALLEST_SCALE

DAMPING = 0.01

SCHEMES = [(4, 32, 192), (4, 64, 192), (4, 128, 256), (4, 192, 192), (8, 192, 192), (8, 32, 160)]
"""Bits, group size and columns: more columns than a block has, and in the end an unfinished block."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated_inputs(*, columns: int, seed: int, tokens: int = 0, outlier: float = 1.0) -> Tensor:
    """Channels that share a quarter as many causes, with noise of a spread of energies: condition number some 400."""
    tokens, causes = tokens or 4 * columns, max(1, columns // 4)
    shared = torch.randn(tokens, causes, generator=generator(seed)) / causes**0.5
    x = shared @ torch.randn(causes, columns, generator=generator(seed + 1))
    x += torch.randn(tokens, columns, generator=generator(seed + 2)) * torch.linspace(0.05, 1.0, columns)
    x[:, columns // 3] *= outlier
    return x


def second_moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def random_weight(*, columns: int, rows: int = 48, seed: int = 7) -> Tensor:
    return torch.randn(rows, columns, generator=generator(seed)) * 0.05


def damped(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """float64"""
    hessian = hessian.double()
    diagonal = torch.where(hessian.diagonal() == 0, 1.0, hessian.diagonal())
    return hessian - hessian.diagonal().diag() + (diagonal + damping * diagonal.mean()).diag()


def order_of(hessian: Tensor, *, act_order: bool) -> list[int]:
    energy = torch.where(hessian.diagonal() == 0, 1.0, hessian.diagonal()).tolist()
    return sorted(range(len(energy)), key=lambda q: -energy[q]) if act_order else list(range(len(energy)))


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """float64"""
    return codes.double() * scales.double().repeat_interleave(codes.shape[1] // scales.shape[1], dim=1)


def losses(weight: Tensor, decoded: Tensor, hessian: Tensor) -> Tensor:
    """Of each row, float64: (w - q) H (w - q)^T."""
    error = weight.double() - decoded.double()
    return ((error @ hessian.double()) * error).sum(dim=1)


@dataclass
class Textbook:
    codes: Tensor
    margins: Tensor
    """Of each row: how near any of its weights came to the middle between two codes, in steps."""


def textbook_gptq(weight: Tensor, scales: Tensor, hessian: Tensor, *, order: list[int], bits: int) -> Textbook:
    """Algorithm 1 of Frantar et al. 2022 in float64, one column after the other over the whole matrix: equation 2 for
    what the others have to make up for, equation 3 to take the column out of the inverse by Gaussian elimination."""
    lowest, highest = CODE_RANGE[bits]
    weight, inverse = weight.double().clone(), torch.linalg.inv(hessian)
    scales = scales.double().repeat_interleave(weight.shape[1] // scales.shape[1], dim=1)
    codes, margins = torch.zeros_like(weight), torch.ones(len(weight), dtype=torch.float64)
    for q in order:
        exact = weight[:, q] / scales[:, q]
        margins = torch.minimum(margins, (exact - exact.floor() - 0.5).abs())
        codes[:, q] = exact.round().clamp(lowest, highest)
        error = weight[:, q] - codes[:, q] * scales[:, q]
        weight -= torch.outer(error / inverse[q, q], inverse[q])
        inverse = inverse - torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return Textbook(codes, margins)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "group_size", "columns"), SCHEMES)
def test_codes_are_those_of_the_papers_algorithm_in_float64(
    bits: int, group_size: int, columns: int, act_order: bool
) -> None:
    """Rows are left out that come within 1e-4 of a step of the middle between two codes: there float32 may rightly
    fall on the other side, and all later columns of the row with it."""
    hessian = second_moment(correlated_inputs(columns=columns, seed=1))
    weight = random_weight(columns=columns)
    scales = search_scales(weight, bits=bits, group_size=group_size)
    expected = textbook_gptq(weight, scales, damped(hessian), order=order_of(hessian, act_order=act_order), bits=bits)
    curvature = factor(hessian.clone(), damping=DAMPING, act_order=act_order)
    codes = _round_by_columns(weight, _Scaled(scales, bits=bits, columns=weight.shape[1]), curvature)
    clear = expected.margins > 1e-4
    assert clear.float().mean() > 0.8
    assert columns > BLOCK
    assert torch.equal(codes[clear].double(), expected.codes[clear])


def test_columns_go_in_the_order_of_their_energy_only_if_asked() -> None:
    hessian = second_moment(correlated_inputs(columns=64, seed=3))
    assert factor(hessian.clone(), damping=DAMPING, act_order=False).order.tolist() == list(range(64))
    ordered = factor(hessian.clone(), damping=DAMPING, act_order=True).order
    assert ordered.tolist() == order_of(hessian, act_order=True) != list(range(64))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("damping", [0.0, 1e-4, 0.01, 0.3])
def test_the_factor_is_upper_and_its_square_the_inverse_of_the_damped_hessian(damping: float, act_order: bool) -> None:
    hessian = second_moment(correlated_inputs(columns=160, seed=4))
    curvature = factor(hessian.clone(), damping=damping, act_order=act_order)
    order = torch.tensor(order_of(hessian, act_order=act_order))
    upper = curvature.inverse_factor.double()
    expected = torch.linalg.inv(damped(hessian, damping)[order][:, order])
    assert torch.equal(upper, upper.triu())
    assert (upper.T @ upper - expected).abs().max() < 1e-4 * expected.abs().max()
    assert torch.allclose(curvature.hessian.double(), damped(hessian, damping), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("act_order", [False, True])
def test_solve_is_multiplication_by_the_inverse(act_order: bool) -> None:
    hessian = second_moment(correlated_inputs(columns=96, seed=5))
    right = torch.randn(7, 96, generator=generator(6))
    expected = right.double() @ torch.linalg.inv(damped(hessian))
    solved = factor(hessian.clone(), damping=DAMPING, act_order=act_order).solve(right)
    assert (solved - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("act_order", [False, True])
def test_a_channel_that_was_always_zero_is_rounded_by_itself_and_changes_no_other(act_order: bool) -> None:
    x = correlated_inputs(columns=96, seed=8)
    dead, alive = [0, 17, 95], [q for q in range(96) if q not in (0, 17, 95)]
    x[:, dead] = 0
    hessian, weight = second_moment(x), random_weight(columns=96)
    scales = search_scales(weight, bits=4, group_size=32)
    curvature = factor(hessian.clone(), damping=DAMPING, act_order=act_order)
    codes = _round_by_columns(weight, _Scaled(scales, bits=4, columns=weight.shape[1]), curvature).double()
    by_column = scales.repeat_interleave(32, dim=1)
    assert torch.equal(codes[:, dead], (weight / by_column)[:, dead].round().clamp(-8, 7).double())
    kept = torch.tensor(alive)
    order = [alive.index(q) for q in order_of(hessian, act_order=act_order) if q in alive]
    expected = textbook_gptq(weight[:, kept], by_column[:, kept], damped(hessian)[kept][:, kept], order=order, bits=4)
    clear = expected.margins > 1e-4
    assert clear.float().mean() > 0.8
    assert torch.equal(codes[:, kept][clear], expected.codes[clear])


def test_inputs_of_nothing_but_zeros_give_the_codes_of_rounding() -> None:
    weight = random_weight(columns=64)
    scales = search_scales(weight, bits=4, group_size=32)
    curvature = factor(torch.zeros(64, 64), damping=DAMPING, act_order=True)
    codes = _round_by_columns(weight, _Scaled(scales, bits=4, columns=weight.shape[1]), curvature)
    assert torch.equal(codes.to(torch.int8), round_to_nearest(weight, name="w", bits=4, group_size=32).codes)


def test_a_matrix_that_rounding_has_left_indefinite_is_damped_ten_times_as_much() -> None:
    """Eigenvalues 2.05 and -0.05: one per cent of damping leaves it indefinite, ten and more does not."""
    hessian = torch.tensor([[1.0, 1.05], [1.05, 1.0]])
    curvature = factor(hessian.clone(), damping=0.01, act_order=False)
    added = (curvature.hessian - hessian).double()
    assert 0.1 <= added[0, 0] <= 0.12
    assert torch.allclose(added, added[0, 0] * torch.eye(2, dtype=torch.float64), atol=1e-6)
    upper = curvature.inverse_factor.double()
    assert torch.allclose(upper.T @ upper, torch.linalg.inv(curvature.hessian.double()), rtol=1e-4)


def test_fewer_tokens_than_channels_and_no_damping_asked_for_are_damped_all_the_same() -> None:
    hessian = second_moment(correlated_inputs(columns=64, tokens=32, seed=9))
    curvature = factor(hessian.clone(), damping=0.0, act_order=True)
    assert torch.isfinite(curvature.inverse_factor).all()


@pytest.mark.parametrize(
    ("value", "position"),
    [
        *((math.nan, at) for at in ((5, 5), (3, 9))),
        *((-math.inf, at) for at in ((5, 5), (3, 9))),
        (math.inf, (3, 9)),
        (math.inf, (5, 5)),
    ],
)
@pytest.mark.parametrize("act_order", [False, True])
def test_a_hessian_that_is_not_finite_is_refused(value: float, position: tuple[int, int], act_order: bool) -> None:
    hessian = second_moment(correlated_inputs(columns=32, seed=10))
    row, column = position
    hessian[row, column] = hessian[column, row] = value
    with pytest.raises(InputError) as caught:
        factor(hessian, damping=DAMPING, act_order=act_order)
    assert str(caught.value) == "the activations of calibration are not finite, or overflow when squared"
    assert caught.value.hint == "check the checkpoint, or take --calibration none"


def best_loss(weight: Tensor, scales: Tensor, hessian: Tensor, *, reach: range) -> Tensor:
    """Of each row the least loss of any codes within ``reach``, by trying all of them; one scale per row."""
    every = torch.tensor(list(itertools.product(reach, repeat=weight.shape[1])), dtype=torch.float64)  # [C, K]
    scales, weight = scales.double(), weight.double()
    quadratic = ((every @ hessian) * every).sum(dim=1, keepdim=True)  # [C, 1]
    cross = every @ (weight @ hessian).T  # [C, N]
    constant = ((weight @ hessian) * weight).sum(dim=1)
    loss: Tensor = (quadratic * scales.T**2 - 2 * cross * scales.T).amin(dim=0) + constant
    return loss


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    ("columns", "step", "reach"), [(4, 0.02, range(-8, 8)), (5, 0.06, range(-4, 5)), (6, 0.1, range(-3, 4))]
)
def test_the_loss_lies_between_rounding_and_the_best_of_all_codes_and_nearer_to_the_best(
    columns: int, step: float, reach: range, act_order: bool
) -> None:
    """24 rows on each of 5 curvatures. The steps are coarse enough that no code out of ``reach`` is of use.

    In order of energy nine tenths of all that can be gained over rounding is gained (97, 97 and 96 % when written).
    """
    gained, possible, worse_rows = 0.0, 0.0, 0
    for seed in range(5):
        weight = random_weight(columns=columns, rows=24, seed=100 + seed).clamp(-0.15, 0.15)
        scales = to_scale_grid(torch.full((24, 1), step))
        hessian = second_moment(correlated_inputs(columns=columns, seed=200 + 10 * seed, tokens=64))
        curvature = factor(hessian.clone(), damping=DAMPING, act_order=act_order)
        codes = _round_by_columns(weight, _Scaled(scales, bits=4, columns=weight.shape[1]), curvature)
        assert reach.start <= codes.min() <= codes.max() < reach.stop
        best = best_loss(weight, scales, damped(hessian), reach=reach)
        found = losses(weight, decode(codes, scales), damped(hessian))
        plain = losses(weight, decode((weight / scales).round(), scales), damped(hessian))
        assert (found >= best * (1 - 1e-4)).all()
        worse_rows += int((found > plain * (1 + 1e-4)).sum())
        gained += (plain - found).sum().item()
        possible += (plain - best).sum().item()
    assert worse_rows <= 0.1 * 5 * 24
    assert gained > (0.9 if act_order else 0.4) * possible


@pytest.mark.parametrize("bits", [4, 8])
def test_the_scale_of_a_group_is_that_of_least_error_among_its_candidates(bits: int) -> None:
    """Every candidate with every code, in float64."""
    weight = random_weight(columns=8, rows=40)
    found = search_scales(weight, bits=bits, group_size=4)
    lowest, highest = CODE_RANGE[bits]
    values = torch.arange(lowest, highest + 1, dtype=torch.float64)
    for row, scale in zip(weight.view(-1, 4), found.flatten().tolist(), strict=True):
        shrinks = torch.linspace(1.0, _SHRINK_LEAST[bits], _SHRINK_STEPS)
        candidates = (row.abs().max() * (shrinks / highest)).bfloat16().double()  # [S]
        distances = (candidates[:, None, None] * values - row.double()[:, None]).abs().amin(dim=2)  # [S, 4]
        errors = dict(zip(candidates.tolist(), distances.square().sum(dim=1).tolist(), strict=True))
        assert errors[scale] <= min(errors.values()) * (1 + 1e-4)


@pytest.mark.parametrize(("bits", "group_size", "columns"), SCHEMES)
def test_the_candidates_leave_little_to_any_other_scale(bits: int, group_size: int, columns: int) -> None:
    """Against 200 scales between half and all of the largest magnitude, on no grid."""
    weight = random_weight(columns=columns, rows=16)
    found = round_to_nearest(weight, name="w", bits=bits, group_size=group_size)
    groups = weight.view(-1, group_size).double()
    lowest, highest = CODE_RANGE[bits]
    best = torch.full((len(groups),), torch.inf, dtype=torch.float64)
    for shrink in torch.linspace(0.5, 1.0, 200).tolist():
        scales = groups.abs().amax(dim=1, keepdim=True) * shrink / highest
        error = (groups - (groups / scales).round().clamp(lowest, highest) * scales).square().sum(dim=1)
        best = torch.minimum(best, error)
    error = (groups - found.dequantize().double().view_as(groups)).square().sum(dim=1)
    assert error.sum() < {4: 1.02, 8: 1.15}[bits] * best.sum()


@pytest.mark.parametrize(("bits", "group_size", "columns"), SCHEMES)
def test_correlated_inputs_lose_half_of_what_rounding_loses(bits: int, group_size: int, columns: int) -> None:
    x, weight = correlated_inputs(columns=columns, seed=11), random_weight(columns=columns)
    plain = round_to_nearest(weight, name="w", bits=bits, group_size=group_size)
    curvature = factor(second_moment(x), damping=DAMPING, act_order=True)
    tensor = gptq(weight, curvature, name="w", bits=bits, group_size=group_size)
    assert (tensor.name, tensor.bits, tensor.group_size) == ("w", bits, group_size)
    assert (tensor.codes != plain.codes).float().mean() > 0.1
    error, plain_error = (x @ (weight - q.dequantize()).T for q in (tensor, plain))
    assert error.square().sum() < 0.5 * plain_error.square().sum()


def test_inputs_that_were_not_seen_gain_too() -> None:
    x, weight = correlated_inputs(columns=192, seed=12, tokens=1536), random_weight(columns=192)
    curvature = factor(second_moment(x[:768]), damping=DAMPING, act_order=True)
    tensor = gptq(weight, curvature, name="w", bits=4, group_size=32)
    plain = round_to_nearest(weight, name="w", bits=4, group_size=32)
    error, plain_error = (x[768:] @ (weight - q.dequantize()).T for q in (tensor, plain))
    assert error.square().sum() < 0.6 * plain_error.square().sum()


@pytest.mark.parametrize(("bits", "group_size", "columns"), SCHEMES)
@pytest.mark.parametrize("act_order", [False, True])
def test_inputs_without_correlation_give_the_codes_of_rounding(
    bits: int, group_size: int, columns: int, act_order: bool
) -> None:
    """Before scales and codes are fitted to each other, which can better the search of one scale at a time."""
    weight = random_weight(columns=columns)
    curvature = factor(torch.eye(columns), damping=DAMPING, act_order=act_order)
    scales = search_scales(weight, bits=bits, group_size=group_size)
    codes = _round_by_columns(weight, _Scaled(scales, bits=bits, columns=weight.shape[1]), curvature)
    assert torch.equal(codes.to(torch.int8), round_to_nearest(weight, name="w", bits=bits, group_size=group_size).codes)


@pytest.mark.parametrize(("bits", "group_size", "columns"), SCHEMES)
@pytest.mark.parametrize("act_order", [False, True])
def test_choosing_codes_again_worsens_no_row_and_ends_where_no_single_code_is_better(
    bits: int, group_size: int, columns: int, act_order: bool
) -> None:
    """In float64; the last property by trying both neighbours of every code."""
    weight = random_weight(columns=columns)
    curvature = factor(second_moment(correlated_inputs(columns=columns, seed=5)), damping=DAMPING, act_order=act_order)
    hessian = curvature.hessian.double()
    scales = search_scales(weight, bits=bits, group_size=group_size)
    wide = scales.repeat_interleave(columns // scales.shape[1], dim=1).double()

    def losses(codes: Tensor) -> Tensor:
        error = weight.double() - codes.double() * wide
        return ((error @ hessian) * error).sum(dim=1)

    codes = _round_by_columns(weight, _Scaled(scales, bits=bits, columns=weight.shape[1]), curvature)
    first = losses(codes)
    for _ in range(30):
        before = losses(codes)
        codes = _choose_again(weight, codes, _Scaled(scales, bits=bits, columns=weight.shape[1]), curvature)
        assert (losses(codes) <= before * (1 + 1e-4)).all()
    assert losses(codes).sum() < first.sum()
    gradient = (weight.double() - codes.double() * wide) @ hessian
    lowest, highest = CODE_RANGE[bits]
    for step in (-1, 1):
        change = hessian.diagonal() * wide.square() - 2 * step * gradient * wide
        allowed = (codes + step >= lowest) & (codes + step <= highest)
        assert (change[allowed] >= -1e-3 * (hessian.diagonal() * wide.square())[allowed]).all()


REFITS = [
    *((*scheme, 1.0, off_by) for scheme in SCHEMES for off_by in (1.0, 1.03, 0.9)),
    *((*scheme, 100.0, 1.0) for scheme in SCHEMES[:-1]),
    (*SCHEMES[-1], 100.0, 1.0),
]


@pytest.mark.parametrize(("bits", "group_size", "columns", "outlier", "off_by"), REFITS)
def test_refitted_scales_worsen_no_row_and_come_near_the_least_squares(
    bits: int, group_size: int, columns: int, outlier: float, off_by: float
) -> None:
    hessian = second_moment(correlated_inputs(columns=columns, seed=13, outlier=outlier))
    curvature = factor(hessian.clone(), damping=DAMPING, act_order=True)
    weight = random_weight(columns=columns)
    scales = search_scales(weight, bits=bits, group_size=group_size)
    codes = _round_by_columns(weight, _Scaled(scales, bits=bits, columns=weight.shape[1]), curvature)
    start = to_scale_grid(scales * off_by)
    fitted = _refit_scales(weight, codes, start, curvature.hessian)
    assert torch.equal(fitted, fitted.bfloat16().float())
    assert fitted.min() >= SMALLEST_SCALE
    before = losses(weight, decode(codes, start), curvature.hessian)
    after = losses(weight, decode(codes, fitted), curvature.hessian)
    assert (after <= before * (1 + 1e-3)).all()
    # The grid has 8 bits: where quantization loses less than that, no scale on it comes near the least squares.
    least = losses(weight, decode(codes, least_squares_scales(weight, codes, hessian, group_size)), curvature.hessian)
    off_grid = (2**-9 * decode(codes, fitted)).square().sum(dim=1) * hessian.diagonal().max()
    assert (after <= 1.05 * least + off_grid).all()


def test_the_scales_that_are_shipped_are_the_refitted_ones() -> None:
    weight = random_weight(columns=192)
    curvature = factor(second_moment(correlated_inputs(columns=192, seed=21)), damping=DAMPING, act_order=True)
    tensor = gptq(weight, curvature, name="w", bits=4, group_size=32)
    searched = decode(tensor.codes, search_scales(weight, bits=4, group_size=32))
    gained = losses(weight, tensor.dequantize(), curvature.hessian).sum()
    assert gained < 0.98 * losses(weight, searched, curvature.hessian).sum()


def least_squares_scales(weight: Tensor, codes: Tensor, hessian: Tensor, group_size: int) -> Tensor:
    """Row by row, float64: the scales s that make |R (w - C s)| least, where R^T R is the damped Hessian."""
    root = torch.linalg.cholesky(damped(hessian)).T
    spread = torch.block_diag(*[torch.ones(group_size, 1, dtype=torch.float64)] * (weight.shape[1] // group_size))
    rows = [
        torch.linalg.lstsq(root @ (c[:, None] * spread), (root @ w)[:, None]).solution.flatten()
        for w, c in zip(weight.double(), codes.double(), strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize(("bits", "group_size", "columns"), SCHEMES)
def test_scales_that_the_weights_were_made_with_are_found_again(bits: int, group_size: int, columns: int) -> None:
    lowest, highest = CODE_RANGE[bits]
    codes = torch.randint(lowest, highest + 1, (24, columns), generator=generator(14)).float()
    true = to_scale_grid(torch.rand(24, columns // group_size, generator=generator(15)) * 0.02 + 0.005)
    weight = decode(codes, true).float()
    curvature = factor(second_moment(correlated_inputs(columns=columns, seed=16)), damping=DAMPING, act_order=True)
    wrong = to_scale_grid(true * (0.95 + 0.1 * torch.rand(true.shape, generator=generator(17))))
    assert (wrong != true).float().mean() > 0.8
    assert torch.equal(_refit_scales(weight, codes, wrong, curvature.hessian), true)


def test_rows_of_zeros_and_weights_below_the_smallest_scale_keep_a_scale_that_targets_hold() -> None:
    weight = random_weight(columns=128)
    weight[0] = 0
    weight[1:5] *= 1e-6
    weight[5, 32:64] = 0
    curvature = factor(second_moment(correlated_inputs(columns=128, seed=18)), damping=DAMPING, act_order=True)
    tensor = gptq(weight, curvature, name="w", bits=4, group_size=32)
    assert not tensor.codes[0].any()
    assert torch.isfinite(tensor.scales).all()
    assert torch.equal(tensor.scales, tensor.scales.bfloat16().float())
    assert torch.equal(tensor.scales, tensor.scales.half().float())
    assert tensor.scales.min() >= SMALLEST_SCALE


def test_a_scale_that_would_turn_negative_is_left_as_it_is() -> None:
    """Two groups of one column that always agree: by themselves 1 and -1 are best, and no scale is negative."""
    hessian = torch.tensor([[1.0, 0.999], [0.999, 1.0]])
    codes, weight = torch.tensor([[4.0, 4.0]]), torch.tensor([[4.0, -4.0]])
    scales = torch.tensor([[0.5, 0.5]])
    fitted = _refit_scales(weight, codes, scales, hessian)
    assert fitted[0, 1] == 0.5
    assert losses(weight, decode(codes, fitted), hessian) <= losses(weight, decode(codes, scales), hessian)


def test_a_group_whose_inputs_are_next_to_silent_keeps_its_scale() -> None:
    """Its text says nothing of it, and another may."""
    x, weight = correlated_inputs(columns=96, seed=20), random_weight(columns=96)
    x[:, 32:64] *= 1e-6
    curvature = factor(second_moment(x), damping=1e-6, act_order=True)
    scales = search_scales(weight, bits=4, group_size=32)
    codes = _round_by_columns(weight, _Scaled(scales, bits=4, columns=weight.shape[1]), curvature)
    fitted = _refit_scales(weight, codes, scales, curvature.hessian)
    assert (fitted[:, [0, 2]] != scales[:, [0, 2]]).float().mean() > 0.5
    assert torch.allclose(fitted[:, 1], scales[:, 1], rtol=0.02)


def test_rows_are_refitted_alike_in_any_company(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(columns=128)
    curvature = factor(second_moment(correlated_inputs(columns=128, seed=19)), damping=DAMPING, act_order=True)
    whole = gptq(weight, curvature, name="w", bits=4, group_size=32)
    monkeypatch.setattr("calibration.gptq._REFIT_ELEMENTS", 128 * 5)  # five rows at once, and three in the end
    parts = gptq(weight, curvature, name="w", bits=4, group_size=32)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.allclose(whole.scales, parts.scales, rtol=2**-7)  # a last place of the grid
    assert (whole.scales == parts.scales).float().mean() > 0.99
