"""Folding: factors that leave the model as it is, and make its weights, or its activations, easier to round."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from calibration.anatomy import Fold, Group, dissect
from calibration.awq import ROWS, awq_factors
from calibration.rtn import round_to_nearest
from calibration.smooth import smooth_factors
from exporter.model.graph import Graph
from exporter.model.reference import FULL_PRECISION, Reference, round_activations
from exporter.model.trace import trace
from exporter.spec import FINAL_NORM, HEAD, Activations, ModelSpec, RopeSpec

IDS = [1, 17, 80, 3, 3, 42, 95, 0, 60, 7, 8, 9]

GQA = ModelSpec(
    name="toy",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    rope=RopeSpec(theta=10000.0),
    bos_token_id=1,
    eos_token_ids=(2,),
)


@pytest.fixture(scope="module", params=["gqa-tied", "gqa-untied", "mha-untied", "mqa-tied"])
def graph(request: pytest.FixtureRequest) -> Graph:
    heads, head = request.param.split("-")
    kv_heads = {"gqa": 2, "mha": 6, "mqa": 1}[heads]
    return trace(replace(GQA, num_key_value_heads=kv_heads, tie_word_embeddings=head == "tied"))


@pytest.fixture(scope="module")
def gqa() -> Graph:
    return trace(GQA)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_weights(spec: ModelSpec) -> dict[str, Tensor]:
    weights = {}
    for seed, (name, shape) in enumerate(spec.weights().items()):
        weights[name] = random(*shape, seed=seed)
        weights[name] = 1 + 0.3 * weights[name] if len(shape) == 1 else weights[name] * 0.15
    return weights


def groups_of(graph: Graph) -> Iterator[Group]:
    for index in range(graph.spec.num_hidden_layers):
        yield from dissect(graph, index).groups


def fold(weights: dict[str, Tensor], group: Group, columns: Tensor, source: Tensor) -> None:
    """Multiply the columns of the group's linears, divide the elements or rows of what comes before them."""
    assert group.fold
    for name in group.linears:
        weights[name] = weights[name] * columns
    before = weights[group.fold.source]
    weights[group.fold.source] = before / (source if before.dim() == 1 else source[:, None])


def some_factors(count: int, *, seed: int) -> Tensor:
    """From a tenth to ten times."""
    return 10 ** (2 * torch.rand(count, generator=torch.Generator().manual_seed(seed)) - 1)


def logits_of(graph: Graph, weights: dict[str, Tensor]) -> Tensor:
    return Reference(graph, weights, FULL_PRECISION).feed(IDS)


def test_any_factors_through_the_folds_of_every_group_leave_the_logits(graph: Graph) -> None:
    weights = random_weights(graph.spec)
    expected = logits_of(graph, weights)
    folded = dict(weights)
    for seed, group in enumerate(groups_of(graph)):
        assert group.fold
        columns = group.fold.tie(some_factors(graph.spec.weights()[group.linears[0]][1], seed=seed))
        fold(folded, group, columns, group.fold.source_factors(columns))
    changed = [name for name in weights if not torch.equal(weights[name], folded[name])]
    inside = [name for name in weights if ".layers." in name]
    assert changed == inside  # every matrix and norm of a layer, and none of the ends
    assert all((folded[name] / weights[name]).max() > 2 for name in inside)
    assert (logits_of(graph, folded) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_factors_that_query_heads_of_one_value_head_do_not_share_change_the_logits(gqa: Graph) -> None:
    weights = random_weights(gqa.spec)
    expected = logits_of(gqa, weights)
    (group,) = (group for group in dissect(gqa, 0).groups if "o_proj" in group.linears[0])
    assert group.fold
    columns = some_factors(96, seed=0)
    for source in (group.fold.source_factors(columns), group.fold.source_factors(group.fold.tie(columns))):
        folded = dict(weights)
        fold(folded, group, columns, source)
        assert (logits_of(gqa, folded) - expected).abs().max() > 0.01 * expected.abs().max()


def test_the_last_norm_and_the_head_are_in_no_group(graph: Graph) -> None:
    """The head reads the last norm, but a tied one could not be changed: it is the embedding too."""
    sources = {group.fold.source for group in groups_of(graph) if group.fold}
    assert FINAL_NORM not in sources
    assert not {HEAD, "model.embed_tokens.weight"} & {name for group in groups_of(graph) for name in group.linears}


def test_tied_factors_are_the_geometric_mean_over_the_query_heads_of_a_value_head() -> None:
    """Four query heads of two channels; the first two read value head 0, the others value head 1."""
    fold = Fold(source="v", heads=4, kv_heads=2)
    tied = fold.tie(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]))
    first, second = [math.sqrt(1 * 3), math.sqrt(2 * 4)], [math.sqrt(5 * 7), math.sqrt(6 * 8)]
    assert torch.allclose(tied, torch.tensor([*first, *first, *second, *second]))
    assert torch.allclose(fold.source_factors(tied), torch.tensor([*first, *second]))
    assert torch.allclose(fold.tie(tied), tied)


def test_factors_of_a_norm_or_of_a_linear_right_before_are_tied_to_nothing() -> None:
    factors = torch.tensor([1.0, 0.5, 4.0])
    fold = Fold(source="norm")
    assert torch.allclose(fold.tie(factors), factors)
    assert torch.equal(fold.source_factors(factors), factors)


def output_loss(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    error = (weight - rounded).double()
    return ((error @ hessian.double()) * error).sum().item()


def factors_for(weights: list[Tensor], hessian: Tensor, *, bits: int = 4, group_size: int = 32) -> Tensor:
    def rounded(rows: Tensor) -> Tensor:
        return round_to_nearest(rows, name="", bits=bits, group_size=group_size).dequantize()

    return awq_factors(weights, hessian, rounded=rounded)


def awq_loss(weight: Tensor, hessian: Tensor, *, bits: int = 4, group_size: int = 32) -> float:
    factors = factors_for([weight], hessian, bits=bits, group_size=group_size)
    tensor = round_to_nearest(weight * factors, name="w", bits=bits, group_size=group_size)
    return output_loss(weight, tensor.dequantize() / factors, hessian)


def rtn_loss(weight: Tensor, hessian: Tensor, *, bits: int = 4, group_size: int = 32) -> float:
    return output_loss(
        weight, round_to_nearest(weight, name="w", bits=bits, group_size=group_size).dequantize(), hessian
    )


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 128), (8, 256)])
@pytest.mark.parametrize("seed", [0, 1])
def test_channels_whose_scale_was_moved_to_the_input_are_moved_back(bits: int, group_size: int, seed: int) -> None:
    """Eight of 256 columns are divided by 20 and their inputs multiplied by it: the same outputs, but small weights
    that matter. What is lost is then what the problem without them loses."""
    weight, x = random(128, 256, seed=seed) * 0.05, random(1024, 256, seed=10 + seed)
    injected = torch.ones(256)
    injected[torch.randperm(256, generator=torch.Generator().manual_seed(seed))[:8]] = 20
    clean = rtn_loss(weight, x.T @ x / len(x), bits=bits, group_size=group_size)
    weight, x = weight / injected, x * injected
    hessian = x.T @ x / len(x)
    plain = rtn_loss(weight, hessian, bits=bits, group_size=group_size)
    calibrated = awq_loss(weight, hessian, bits=bits, group_size=group_size)
    assert plain > 3 * clean
    assert calibrated < 1.1 * clean


def test_factors_have_a_geometric_mean_of_one_and_grow_with_the_input() -> None:
    weight, x = random(64, 128, seed=2) * 0.05, random(512, 128, seed=3)
    x[:, :4] *= 30
    factors = factors_for([weight], x.T @ x / len(x))
    assert factors.log().mean().abs() < 1e-5
    assert factors[:4].min() > 1.5 * factors[4:].max()


def test_no_candidate_of_the_paper_or_of_its_code_loses_less() -> None:
    """x^a of equation 4, and x^a w^(a - 1) of the paper's code, on the grid of five."""
    weight, x = random(96, 128, seed=4) * 0.05, random(512, 128, seed=5) * torch.logspace(-1, 1, 128)
    weight[:, ::7] *= 4
    hessian = x.T @ x / len(x)
    least = awq_loss(weight, hessian)
    x_rms, w_rms = x.square().mean(dim=0).sqrt(), weight.square().mean(dim=0).sqrt()
    for a in (0.0, 0.25, 0.5, 0.75, 1.0):
        for wished in (x_rms**a, x_rms**a * w_rms ** (a - 1)):
            factors = wished / wished.log().mean().exp()
            rounded = round_to_nearest(weight * factors, name="w", bits=4, group_size=32).dequantize() / factors
            assert least <= output_loss(weight, rounded, hessian) * (1 + 1e-3)
    assert least < 0.8 * rtn_loss(weight, hessian)


def test_all_linears_of_a_group_are_weighed_together() -> None:
    """One gains by factors that harm the other: the pair gets those that are best for their sum."""
    one, other = random(64, 64, seed=6) * 0.05, random(64, 64, seed=7) * 0.1
    one[:, :3] /= 20
    other[:, 10:13] *= 20
    x = random(512, 64, seed=8)
    x[:, :3] *= 20
    hessian = x.T @ x / len(x)

    def loss(factors: Tensor) -> float:
        rounded = [round_to_nearest(w * factors, name="w", bits=4, group_size=32) for w in (one, other)]
        return sum(
            output_loss(w, r.dequantize() / factors, hessian) for w, r in zip((one, other), rounded, strict=True)
        )

    alone = [factors_for([weight], hessian) for weight in (one, other)]
    together = loss(factors_for([one, other], hessian))
    assert all(together <= loss(factors) * (1 + 1e-5) for factors in alone)
    assert together < 0.95 * max(loss(factors) for factors in alone)


def test_where_no_channel_differs_nothing_is_lost() -> None:
    weight, x = random(64, 128, seed=7) * 0.05, random(512, 128, seed=8)
    hessian = x.T @ x / len(x)
    assert awq_loss(weight, hessian) <= rtn_loss(weight, hessian)


def test_weights_that_are_exact_as_they_are_keep_factors_of_one() -> None:
    """Multiples of 2**-6 up to 7, in each row and group: their rounding loses nothing, and no candidate beats it."""
    codes = torch.randint(-7, 8, (32, 64), generator=torch.Generator().manual_seed(9))
    codes[:, ::32] = 7
    x = random(256, 64, seed=10) * torch.linspace(0.1, 3.0, 64)
    factors = factors_for([codes / 64], x.T @ x / len(x))
    assert torch.allclose(factors, torch.ones(64))


def test_silent_channels_get_finite_factors() -> None:
    weight, x = random(48, 64, seed=11), random(256, 64, seed=12)
    weight[:, 3], x[:, 5] = 0, 0
    weight[:, 7], x[:, 7] = 0, 0
    factors = factors_for([weight], x.T @ x / len(x))
    assert torch.isfinite(factors).all()
    assert (factors > 0).all()
    assert torch.isfinite(factors_for([weight], torch.zeros(64, 64))).all()
    assert torch.isfinite(factors_for([torch.zeros(48, 64)], x.T @ x)).all()


def test_a_silent_channel_does_not_keep_others_from_their_factors() -> None:
    weight, x = random(64, 64, seed=17) * 0.05, random(512, 64, seed=18)
    weight[:, :3] /= 20
    x[:, :3] *= 20
    x[:, 40], weight[:, 50] = 0, 0
    hessian = x.T @ x / len(x)
    assert awq_loss(weight, hessian) < 0.5 * rtn_loss(weight, hessian)


def test_a_spread_of_rows_stands_for_all_of_them() -> None:
    """Three times as many rows as are looked at, the first third of them unlike the rest."""
    weight, x = random(3 * ROWS, 64, seed=13) * 0.05, random(512, 64, seed=14)
    weight[ROWS:, :3] /= 20
    x[:, :3] *= 20
    hessian = x.T @ x / len(x)
    assert awq_loss(weight, hessian) < 0.5 * rtn_loss(weight, hessian)


def test_smoothing_follows_equation_4() -> None:
    """max|x|^0.5 / max|w|^0.5 per channel, over the rows of both linears."""
    weights = [torch.tensor([[1.0, -4.0, 0.0, 2.0]]), torch.tensor([[-9.0, 1.0, 0.0, 1.0], [3.0, 2.0, 0.0, 1.0]])]
    largest = torch.tensor([36.0, 1.0, 5.0, 0.0])
    assert torch.allclose(smooth_factors(weights, largest), torch.tensor([2.0, 0.5, 1.0, 1.0]))


def test_smoothed_inputs_with_outliers_round_better_to_int8_for_each_token() -> None:
    x, weight = random(200, 64, seed=15), random(48, 64, seed=16) * 0.05
    x[:, [5, 40]] *= 60
    factors = smooth_factors([weight], x.abs().amax(dim=0))
    smoothed, columns = x / factors, weight * factors
    assert torch.allclose(smoothed @ columns.T, x @ weight.T, atol=1e-3)

    def error(inputs: Tensor, matrix: Tensor) -> float:
        """Mean squared, of the output of both rounded as a runtime would."""
        rounded = round_activations(inputs, Activations.INT8_PER_TOKEN, group_size=64)
        codes = round_to_nearest(matrix, name="w", bits=8, group_size=64).dequantize()
        return (rounded @ codes.T - x @ weight.T).square().mean().item()

    rounded = round_activations(smoothed, Activations.INT8_PER_TOKEN, group_size=64)
    plain = round_activations(x, Activations.INT8_PER_TOKEN, group_size=64)
    relative = (rounded - smoothed).square().sum() / smoothed.square().sum()
    quiet = [q for q in range(64) if q not in (5, 40)]
    quiet_before = (plain - x)[:, quiet].square().sum() / x[:, quiet].square().sum()
    quiet_after = (rounded - smoothed)[:, quiet].square().sum() / smoothed[:, quiet].square().sum()
    assert relative < 1e-3
    assert quiet_after < 0.1 * quiet_before
    assert error(smoothed, columns) < 0.2 * error(x, weight)
