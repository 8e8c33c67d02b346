"""Codes and scales: on the grid that all targets hold, of least error, and the same numbers in every runtime."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibration.rtn import round_to_nearest
from exporter.quantized import CODE_RANGE, SMALLEST_SCALE, QuantizedTensor, pack_int4, unpack_int4
from tests.conftest import apply_matmulnbits


def random_weight(seed: int, *, rows: int = 16, columns: int = 256, spread: float = 0.02) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * spread
    weight[:, :: max(2, seed % 37 + 2)] *= 8  # outlier columns
    return weight


weights = st.builds(
    random_weight,
    st.integers(0, 2**20),
    spread=st.sampled_from([1e-7, 1e-3, 0.02, 1.0, 300.0]),
)
schemes = st.sampled_from([(4, 32), (4, 64), (4, 128), (8, 256)])


@settings(max_examples=60, deadline=None)
@given(weight=weights, scheme=schemes)
def test_scales_are_exact_in_bf16_fp16_and_fp32_and_codes_in_range(weight: Tensor, scheme: tuple[int, int]) -> None:
    bits, group_size = scheme
    tensor = round_to_nearest(weight, name="w", bits=bits, group_size=group_size)
    assert torch.equal(tensor.scales, tensor.scales.bfloat16().float())
    assert torch.equal(tensor.scales, tensor.scales.half().float())
    assert tensor.scales.min() >= SMALLEST_SCALE
    lowest, highest = CODE_RANGE[bits]
    assert tensor.codes.min() >= lowest
    assert tensor.codes.max() <= highest


@settings(max_examples=40, deadline=None)
@given(weight=weights, scheme=schemes)
def test_no_other_scale_of_the_plain_rounding_has_less_error(weight: Tensor, scheme: tuple[int, int]) -> None:
    """Against absmax rounding, which is one of the candidates: the search never loses to it, in any group."""
    bits, group_size = scheme
    tensor = round_to_nearest(weight, name="w", bits=bits, group_size=group_size)
    groups = weight.view(-1, group_size)
    highest = CODE_RANGE[bits][1]
    scales = (groups.abs().amax(dim=1, keepdim=True) / highest).bfloat16().float().clamp(min=SMALLEST_SCALE)
    plain = (groups / scales).round().clamp(*CODE_RANGE[bits]) * scales
    error = (tensor.dequantize().view(-1, group_size) - groups).square().sum(dim=1)
    assert (error <= (plain - groups).square().sum(dim=1) * (1 + 1e-6)).all()


def test_the_search_gains_at_four_bits() -> None:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    tensor = round_to_nearest(weight, name="w", bits=4, group_size=32)
    groups = weight.view(-1, 32)
    scales = groups.abs().amax(dim=1, keepdim=True) / 7
    plain = ((groups / scales).round() * scales - groups).square().mean()
    searched = (tensor.dequantize().view(-1, 32) - groups).square().mean()
    assert searched < 0.9 * plain


def test_every_code_is_the_nearest_one() -> None:
    weight = random_weight(5)
    tensor = round_to_nearest(weight, name="w", bits=4, group_size=32)
    scales = tensor.scales.repeat_interleave(32, dim=1)
    distances = torch.stack([(code * scales - weight).abs() for code in range(-8, 8)])
    assert torch.allclose(distances.amin(dim=0), (tensor.dequantize() - weight).abs(), atol=1e-9)


def test_zeros_stay_zero_with_the_smallest_scale() -> None:
    tensor = round_to_nearest(torch.zeros(4, 64), name="w", bits=4, group_size=32)
    assert not tensor.codes.any()
    assert (tensor.scales == SMALLEST_SCALE).all()


def test_rows_are_independent_of_the_block_they_are_searched_in() -> None:
    weight = random_weight(9, rows=5000, columns=512)  # more than one block
    whole = round_to_nearest(weight, name="w", bits=4, group_size=32)
    tail = round_to_nearest(weight[-3:], name="w", bits=4, group_size=32)
    assert torch.equal(whole.codes[-3:], tail.codes)
    assert torch.equal(whole.scales[-3:], tail.scales)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**20))
def test_packing_is_undone_by_unpacking(seed: int) -> None:
    codes = torch.randint(-8, 8, (3, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    packed = pack_int4(codes)
    assert packed.shape == (3, 32)
    assert torch.equal(unpack_int4(packed), codes)
    assert packed[0, 0].item() & 0xF == codes[0, 0].item() % 16  # low nibble first


def test_scales_of_the_wrong_shape_are_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"w: scales are \(4, 1\), but codes \(4, 64\) in groups of 32 want \(4, 2\)"):
        QuantizedTensor(
            name="w", bits=4, group_size=32, codes=torch.zeros(4, 64, dtype=torch.int8), scales=torch.ones(4, 1)
        )


@pytest.mark.toolchain
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), scheme=schemes, spread=st.sampled_from([1e-3, 0.02, 1.0]))
def test_codes_dequantize_to_the_same_bits_in_matmulnbits(seed: int, scheme: tuple[int, int], spread: float) -> None:
    bits, group_size = scheme
    tensor = round_to_nearest(random_weight(seed, spread=spread), name="w", bits=bits, group_size=group_size)
    assert torch.equal(apply_matmulnbits(tensor, torch.eye(256), accuracy_level=0).T, tensor.dequantize())


@pytest.mark.toolchain
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), scheme=schemes, spread=st.sampled_from([1e-3, 0.02, 1.0]))
def test_codes_dequantize_to_the_same_bits_in_torchao(seed: int, scheme: tuple[int, int], spread: float) -> None:
    from targets.executorch.border import toolchain

    with toolchain("import torchao"):
        from torchao.quantization import IntxUnpackedToInt8Tensor

    bits, group_size = scheme
    tensor = round_to_nearest(random_weight(seed, spread=spread), name="w", bits=bits, group_size=group_size)
    theirs = IntxUnpackedToInt8Tensor(
        qdata=tensor.codes,
        scale=tensor.scales,
        zero_point=torch.zeros_like(tensor.scales, dtype=torch.int8),
        target_dtype=torch.int4 if bits == 4 else torch.int8,
        block_size=(1, group_size),
        dtype=torch.float32,
        activation_quantization=None,
    )
    assert torch.equal(theirs.dequantize(), tensor.dequantize())


@pytest.mark.toolchain
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), scheme=schemes, spread=st.sampled_from([1e-3, 0.02, 1.0]))
def test_core_ml_dequantizes_to_code_times_scale_rounded_to_fp16(
    seed: int, scheme: tuple[int, int], spread: float
) -> None:
    """int4 needs no rounding (4 + 8 significant bits fit fp16's 11 for codes of at most 8); int8 does."""
    from targets.coreml.toolchain import quiet, types

    with quiet():
        from coremltools.converters.mil.mil.ops.defs.iOS18 import constexpr_blockwise_shift_scale

    bits, group_size = scheme
    tensor = round_to_nearest(random_weight(seed, spread=spread), name="w", bits=bits, group_size=group_size)
    dtype = types.nptype_from_builtin(types.int4 if bits == 4 else types.int8)
    theirs = constexpr_blockwise_shift_scale.decompress(
        tensor.codes.numpy().astype(dtype), tensor.scales.half().numpy(), None
    )
    ours = tensor.dequantize()
    assert torch.equal(torch.from_numpy(theirs), ours.half())
    if bits == 4:
        assert torch.equal(ours.half().float(), ours)
