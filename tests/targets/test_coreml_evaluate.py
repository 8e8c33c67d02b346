"""The MIL evaluator, against coremltools' own inference of constants and against expressions written another way."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from exporter.errors import InputError, LoweringError
from exporter.quantized import pack_int4
from targets.coreml.evaluate import OPS, Evaluator, Rounding, Rows, State, decompress, look_up
from targets.coreml.toolchain import Model_pb2, ct, get_new_symbol, mb, quiet, types, without_progress_bars

pytestmark = pytest.mark.toolchain


def random(*shape: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(shape, generator=generator).numpy()


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


CASES: list[tuple[str, dict[str, Any]]] = [
    *(
        (op, {"x": random(*x), "y": random(*y)})
        for op in ("add", "maximum", "minimum", "mul", "sub")
        for x, y in (((3, 4), (3, 4)), ((1, 5, 4), (1, 1, 4)), ((2, 1, 3, 4), (1, 1, 3, 1)))
    ),
    *(("square", {"x": random(*shape)}) for shape in ((4,), (1, 7, 16))),
    *(("identity", {"x": random(*shape)}) for shape in ((4,), (1, 7, 16))),
    *(("shape", {"x": random(*shape)}) for shape in ((4,), (1, 7, 16), (1, 1, 3, 9))),
    *(("rsqrt", {"x": abs(random(*shape)), "epsilon": np.float32(e)}) for shape, e in (((5,), 1e-5), ((1, 4, 1), 0.1))),
    *(
        ("reduce_mean", {"x": random(*shape), "axes": ints(*axes), "keep_dims": keep})
        for shape, axes, keep in (((1, 5, 64), (-1,), True), ((2, 3, 4), (1,), False), ((2, 3, 4), (0, 2), True))
    ),
    *(
        ("gather", {"x": random(rows, 6), "indices": np.array([ids], dtype=np.int32), "axis": 0})
        for rows, ids in ((4, [0, 3, 3]), (9, [8]))
    ),
    *(
        (op, {"x": random(*shape), "axes": ints(*axes), "keep_dims": keep})
        for op in ("reduce_max", "reduce_min")
        for shape, axes, keep in (((1, 5, 8), (-1,), True), ((1, 3, 1), (0, 1, 2), False))
    ),
    *((op, {"x": random(1, 3, 4), "y": random(1, 3, 1)}) for op in ("greater", "greater_equal")),
    ("greater_equal", {"x": ints(3, 0, -2), "y": ints(3, 1, -2)}),
    ("sigmoid", {"x": 4 * random(1, 3, 5)}),
    *(("topk", {"x": random(1, 3, 9), "k": count, "axis": -1}) for count in (1, 4)),
    ("equal", {"x": ints(3, 0, -2), "y": ints(3, 1, -2)}),
    ("equal", {"x": ints(3, 0), "y": np.int32(0)}),
    ("gather", {"x": random(5, 6, 1, 1), "indices": np.array([[4, 0]], dtype=np.int32), "axis": 0}),
    *(
        ("matmul", {"x": random(*x), "y": random(*y), "transpose_x": False, "transpose_y": transposed})
        for x, y, transposed in (((1, 2, 3, 4), (1, 2, 5, 4), True), ((1, 2, 3, 5), (1, 2, 5, 4), False))
    ),
    *(("softmax", {"x": 4 * random(*shape), "axis": axis}) for shape, axis in (((2, 3, 7), -1), ((1, 5, 2), 1))),
    *(
        ("layer_norm", {"x": random(*x), "axes": ints(axis), "gamma": random(x[axis]), "epsilon": np.float32(e)})
        for x, axis, e in (((1, 6, 1, 5), 1, 1e-5), ((2, 3, 8), 2, 0.1))
    ),
    (
        "layer_norm",
        {"x": random(2, 3, 8), "axes": ints(-1), "gamma": random(8), "beta": random(8) + 1, "epsilon": np.float32(0.1)},
    ),
    *((op, {"x": 4 * random(1, 3, 5), **mode}) for op, mode in (("tanh", {}), ("gelu", {"mode": "EXACT"}))),
    *(
        ("linear", {"x": random(1, t, k), "weight": random(n, k), "bias": random(n)})
        for t, k, n in ((1, 8, 3), (5, 16, 16), (3, 4, 9))
    ),
    *(
        ("concat", {"values": [random(*shape) for shape in shapes], "axis": axis})
        for shapes, axis in ((((2, 3), (2, 1)), -1), (((1, 4), (2, 4), (1, 4)), 0))
    ),
    *(
        ("slice_by_size", {"x": random(*shape), "begin": ints(*begin), "size": ints(*size)})
        for shape, begin, size in (((5,), (2,), (3,)), ((2, 4, 6), (1, 0, 3), (1, 4, 2)))
    ),
    *(
        ("slice_update", {"x": random(*shape), "update": random(*update), "begin": ints(*begin), "end": ints(*end)})
        for shape, update, begin, end in (
            ((4, 3), (2, 3), (1, 0), (3, 3)),
            ((2, 1, 2, 8, 4), (1, 1, 2, 3, 4), (1, 0, 0, 5, 0), (2, 1, 2, 8, 4)),
        )
    ),
    *(("split", {"x": random(*shape), "num_splits": 2, "axis": axis}) for shape, axis in (((3, 8), -1), ((4, 3), 0))),
    *(
        ("tile", {"x": random(*shape), "reps": ints(*reps)})
        for shape, reps in (((1, 1, 3, 4), (1, 1, 2, 1)), ((2,), (3,)))
    ),
    *(
        ("transpose", {"x": random(*s), "perm": ints(*p)})
        for s, p in (((2, 3, 4), (0, 2, 1)), ((1, 2, 3, 4), (0, 2, 1, 3)))
    ),
    *(("reshape", {"x": random(*s), "shape": ints(*to)}) for s, to in (((2, 3, 4), (6, -1)), ((1, 6), (1, 2, 3)))),
    *(("expand_dims", {"x": random(2, 3), "axes": ints(axis)}) for axis in (0, 1, -1)),
    *(("squeeze", {"x": random(*s), "axes": ints(axis)}) for s, axis in (((1, 2, 3), 0), ((2, 1, 3), 1))),
    *(
        ("pad", {"x": random(2, 3), "pad": ints(*places), "mode": "constant", "constant_val": np.float32(-4096)})
        for places in ((0, 1), (2, 0))
    ),
]


@pytest.mark.parametrize(("op", "arguments"), CASES, ids=[f"{index}-{op}" for index, (op, _) in enumerate(CASES)])
def test_op_computes_what_coremltools_infers_for_constants(op: str, arguments: dict[str, Any]) -> None:
    inferred: list[np.ndarray] = []

    def emit() -> None:
        result = getattr(mb, op)(**arguments)
        inferred.extend(variable.val for variable in (result if isinstance(result, tuple | list) else [result]))

    in_a_program(emit)
    computed = OPS[op](**defaults(op), **{name: as_tensor(value) for name, value in arguments.items()})
    computed = computed if isinstance(computed, tuple) else (computed,)
    for found, wanted in zip(computed, inferred, strict=True):
        torch.testing.assert_close(found, torch.from_numpy(np.asarray(wanted)), atol=1e-6, rtol=1e-5)


def test_every_op_of_the_table_is_tested() -> None:
    """Those without an inference in coremltools have a test of their own below."""
    own = {"cast", "conv", "read_state", "write_state", "scaled_dot_product_attention", "silu"}
    assert {op for op, _ in CASES} | own == set(OPS)


def in_a_program(emit: Callable[[], None]) -> None:
    with quiet():

        @mb.program(input_specs=[mb.TensorSpec((1,), types.fp32)], opset_version=ct.target.iOS18)
        def program(x: Any) -> Any:
            emit()
            return mb.identity(x=x)


def defaults(op: str) -> dict[str, Any]:
    """Arguments that the builder adds by itself."""
    false, zero = torch.tensor(False), torch.tensor(0)
    added = {
        "concat": {"interleave": false},
        "gather": {"batch_dims": zero, "validate_indices": false},
        "topk": {"ascending": false, "sort": ~false, "return_indices": ~false},
    }
    return added.get(op, {})


def as_tensor(value: Any) -> Any:
    if isinstance(value, str):
        return value
    return [as_tensor(item) for item in value] if isinstance(value, list) else torch.from_numpy(np.asarray(value))


CONV = {"pad_type": "valid", **{k: torch.tensor(v) for k, v in {"strides": [1, 1], "pad": [0] * 4}.items()}}
CONV |= {"dilations": torch.tensor([1, 1]), "groups": torch.tensor(1)}


@pytest.mark.parametrize(("channels", "outputs", "length"), [(4, 3, 1), (6, 6, 5)])
def test_convolution_of_one_place_is_that_of_torch(channels: int, outputs: int, length: int) -> None:
    x, weight = torch.from_numpy(random(1, channels, 1, length)), torch.from_numpy(random(outputs, channels, 1, 1))
    wanted = torch.nn.functional.conv2d(x, weight)
    torch.testing.assert_close(OPS["conv"](x=x, weight=weight, **CONV), wanted, atol=1e-6, rtol=1e-5)
    rows = Rows(shape=tuple(weight.shape), decode=lambda which: weight[which])
    torch.testing.assert_close(OPS["conv"](x=x, weight=rows, **CONV), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"strides": torch.tensor([1, 2])},
        {"pad": torch.tensor([0, 0, 1, 0])},
        {"groups": torch.tensor(2)},
        {"pad_type": "same"},
        {"weight": torch.zeros(3, 4, 1, 3)},
        {"weight": torch.zeros(3, 5, 1, 1)},
    ],
)
def test_any_other_convolution_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"convolution|do not fit"):
        OPS["conv"](**{"x": torch.zeros(1, 4, 1, 6), "weight": torch.zeros(3, 4, 1, 1), **CONV, **change})


def test_a_product_of_unequal_batches_is_refused() -> None:
    false = torch.tensor(False)
    with pytest.raises(ValueError, match="differ in batch dimensions"):
        OPS["matmul"](x=torch.zeros(1, 8, 3, 4), y=torch.zeros(1, 2, 4, 5), transpose_x=false, transpose_y=false)


def test_gains_of_another_length_are_refused() -> None:
    x, axes = torch.zeros(1, 6, 1, 5), torch.tensor([1])
    with pytest.raises(ValueError, match=r"gains \[3\] do not fit axis 1"):
        OPS["layer_norm"](x=x, axes=axes, gamma=torch.ones(3), epsilon=torch.tensor(1e-5))
    with pytest.raises(ValueError, match=r"offsets \[1\] do not fit axis 1"):
        OPS["layer_norm"](x=x, axes=axes, gamma=torch.ones(6), beta=torch.ones(1), epsilon=torch.tensor(1e-5))


def test_a_gelu_that_is_an_approximation_is_refused() -> None:
    with pytest.raises(ValueError, match="mode TANH_APPROXIMATION, EXACT was expected"):
        OPS["gelu"](x=torch.zeros(3), mode="TANH_APPROXIMATION")


@pytest.mark.parametrize("shape", [(3,), (1, 5, 8)])
def test_silu_is_x_times_its_sigmoid(shape: tuple[int, ...]) -> None:
    x = 4 * torch.from_numpy(random(*shape))
    torch.testing.assert_close(OPS["silu"](x=x), x / (1 + torch.exp(-x)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("heads", "queries", "keys", "width"), [(1, 1, 1, 4), (2, 3, 7, 8), (3, 8, 5, 16)])
def test_attention_is_a_weighted_mean_of_the_values_that_a_query_may_see(
    heads: int, queries: int, keys: int, width: int
) -> None:
    q, k, v = (torch.from_numpy(random(1, heads, count, width)) for count in (queries, keys, keys))
    visible = torch.ones(queries, keys).tril(diagonal=keys - queries if keys > queries else 0).bool()
    mask = torch.zeros(queries, keys).masked_fill(~visible, float("-inf"))[None, None]
    found = OPS["scaled_dot_product_attention"](query=q, key=k, value=v, attn_mask=mask)
    for head in range(heads):
        for query in range(queries):
            seen = visible[query].nonzero().flatten().tolist()
            weights = [math.exp(float(q[0, head, query] @ k[0, head, key]) / math.sqrt(width)) for key in seen]
            mean = sum(w * v[0, head, key] for w, key in zip(weights, seen, strict=True)) / sum(weights)
            torch.testing.assert_close(found[0, head, query], mean, atol=1e-5, rtol=1e-4)


def test_attention_with_unequal_heads_is_refused() -> None:
    q, k = torch.zeros(1, 8, 3, 4), torch.zeros(1, 2, 5, 4)
    with pytest.raises(ValueError, match=r"differ in batch dimensions: \[\(1, 2\), \(1, 8\)\]"):
        OPS["scaled_dot_product_attention"](query=q, key=k, value=k, attn_mask=torch.zeros(1, 1, 3, 5))


def test_attention_with_a_mask_for_one_query_is_refused_for_three() -> None:
    q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4)
    with pytest.raises(ValueError, match="does not fit 3 queries, 5 keys"):
        OPS["scaled_dot_product_attention"](query=q, key=k, value=k, attn_mask=torch.zeros(1, 1, 1, 5))


def test_linear_of_the_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x \[1, 2, 3\], weight \[5, 4\]"):
        OPS["linear"](x=torch.zeros(1, 2, 3), weight=torch.zeros(5, 4), bias=torch.zeros(5))


def test_an_update_that_would_have_to_be_broadcast_is_refused() -> None:
    x, update = torch.zeros(4, 3), torch.ones(1, 3)
    with pytest.raises(ValueError, match="does not fill"):
        OPS["slice_update"](x=x, update=update, begin=torch.tensor([0, 0]), end=torch.tensor([2, 3]))


def test_a_slice_beyond_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match="does not lie within"):
        OPS["slice_by_size"](x=torch.zeros(4), begin=torch.tensor([2]), size=torch.tensor([3]))


def test_a_token_outside_of_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="indices 1 to 4 are outside of 4"):
        OPS["gather"](x=torch.zeros(4, 2), indices=torch.tensor([[1, 4]]), axis=torch.tensor(0), **defaults("gather"))


def test_a_state_of_another_shape_is_not_written() -> None:
    with pytest.raises(ValueError, match=r"\[2\] is written to a state of \[3\]"):
        OPS["write_state"](input=State((3,)), data=torch.zeros(2))


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize(
    ("bits", "rows", "columns", "groups"), [(4, 8, 64, 2), (4, 3, 128, 1), (8, 5, 32, 1), (8, 2, 64, 4)]
)
def test_codes_are_decompressed_bit_for_bit_as_coremltools_does(
    bits: int, rows: int, columns: int, groups: int, offsets: bool
) -> None:
    generator = torch.Generator().manual_seed(bits + rows)
    limit = 1 << (bits - 1)
    codes = torch.randint(-limit, limit, (rows, columns), generator=generator).to(torch.int8)
    scales = (torch.rand(rows, groups, generator=generator) * 0.1 + 1e-4).half()
    parts = {"data": codes}
    if offsets:
        parts["offset"] = torch.randint(-limit, limit, (rows, groups), generator=generator).to(torch.int8)
    wanted: list[np.ndarray] = []

    def emit() -> None:
        dtype = types.nptype_from_builtin(types.int4 if bits == 4 else types.int8)
        arrays = {name: part.numpy().astype(dtype) for name, part in parts.items()}
        variable = mb.constexpr_blockwise_shift_scale(**arrays, scale=scales.numpy())
        wanted.append(variable.op.materialized_val_inference())

    in_a_program(emit)
    assert torch.equal(decompress(**parts, scale=scales).half(), torch.from_numpy(wanted[0]))


def test_offsets_of_another_shape_than_scales_are_refused() -> None:
    codes, scales = torch.zeros(2, 32, dtype=torch.int8), torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"offsets \[2, 1\] and scales \[2, 2\] differ"):
        decompress(data=codes, scale=scales, offset=torch.zeros(2, 1, dtype=torch.int8))


@pytest.mark.parametrize(
    ("rows", "columns", "tables", "kernel"), [(16, 24, 2, False), (8, 5, 1, False), (32, 8, 4, True)]
)
def test_palettes_are_looked_up_as_coremltools_does(rows: int, columns: int, tables: int, kernel: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    behind = (1, 1) if kernel else ()
    indices = torch.randint(0, 16, (rows, columns, *behind), generator=generator).to(torch.int8)
    lut = torch.randn(tables, 1, *behind, 16, 1, generator=generator).half()
    wanted: list[np.ndarray] = []

    def emit() -> None:
        data = indices.numpy().astype(types.nptype_from_builtin(types.uint4))
        variable = mb.constexpr_lut_to_dense(indices=data, lut=lut.numpy())
        wanted.append(variable.op.materialized_val_inference())

    in_a_program(emit)
    by_row = lut.repeat_interleave(rows // tables, dim=0)
    assert torch.equal(look_up(indices=indices, lut=by_row).half(), torch.from_numpy(wanted[0]))


def test_tables_of_another_form_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tables \[4, 2, 16, 1\] do not go with the rows of indices \[4, 6\]"):
        look_up(indices=torch.zeros(4, 6, dtype=torch.int8), lut=torch.zeros(4, 2, 16, 1))


def test_scales_that_do_not_divide_the_codes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scales \[2, 3\] do not divide codes \[2, 40\]"):
        decompress(data=torch.zeros(2, 40, dtype=torch.int8), scale=torch.ones(2, 3, dtype=torch.float16))


# A small program with a weight, a state and both float types, saved as a package and then tampered with.

CODES = torch.arange(-8, 8, dtype=torch.int8).repeat(8).view(8, 16)
SCALES = torch.full((8, 1), 0.25, dtype=torch.float16)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x float16 [1, T, 16] -> y = linear(x) + the state, which takes y's last row."""
    path: Path = tmp_path_factory.mktemp("mil") / "small.mlpackage"
    with quiet(), without_progress_bars():

        @mb.program(
            input_specs=[
                mb.TensorSpec((1, get_new_symbol(), 16), types.fp16),
                mb.StateTensorSpec((1, 1, 8), types.fp16),
            ],
            opset_version=ct.target.iOS18,
        )
        def program(x: Any, total: Any) -> Any:
            codes = CODES.numpy().astype(types.nptype_from_builtin(types.int4))
            weight = mb.constexpr_blockwise_shift_scale(data=codes, scale=SCALES.numpy(), name="weight")
            wide = mb.cast(x=mb.linear(x=x, weight=weight, name="product"), dtype="fp32")
            y = mb.cast(x=mb.mul(x=wide, y=np.float32(1 / 3)), dtype="fp16")
            y = mb.add(x=y, y=mb.read_state(input=total), name="y")
            last = mb.slice_by_size(x=y, begin=[0, 0, 0], size=[1, 1, 8])
            mb.coreml_update_state(state=total, value=last)
            return y

        ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
            package_dir=str(path),
            inputs=[ct.TensorType("x", shape=(1, ct.RangeDim(1, 4, default=1), 16), dtype=np.float16)],
        )
    return path


@pytest.fixture(scope="module")
def branching(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x float16 [1, T, 16] -> x times weights that lie outside of the branch, where any of x is above 1; else x."""
    path: Path = tmp_path_factory.mktemp("mil") / "branch.mlpackage"
    with quiet(), without_progress_bars():

        @mb.program(input_specs=[mb.TensorSpec((1, get_new_symbol(), 16), types.fp16)], opset_version=ct.target.iOS18)
        def program(x: Any) -> Any:
            weight = mb.const(val=np.eye(16, dtype=np.float16)[::-1].copy(), name="weight")
            largest = mb.reduce_max(x=x, axes=[0, 1, 2], keep_dims=False)
            return mb.cond(
                pred=mb.greater(x=largest, y=np.float16(1)),
                _true_fn=lambda: mb.mul(x=mb.linear(x=x, weight=weight), y=np.float16(2)),
                _false_fn=lambda: mb.identity(x=x),
                name="y",
            )

        ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
            package_dir=str(path),
            inputs=[ct.TensorType("x", shape=(1, ct.RangeDim(1, 4, default=1), 16), dtype=np.float16)],
        )
    return path


def test_of_two_branches_the_one_is_computed_that_the_predicate_says(branching: Path) -> None:
    evaluate = Evaluator(branching, rounding=Rounding.NONE)
    x = torch.linspace(-3, 0.5, 32).view(1, 2, 16)
    assert torch.equal(evaluate({"x": x})["y"], x)
    assert torch.equal(evaluate({"x": x + 1})["y"], 2 * (x + 1).flip(-1))


def test_an_unknown_op_inside_of_a_branch_is_named(branching: Path, tmp_path: Path) -> None:
    def rename(operation: Any) -> None:
        for block in operation.blocks:
            for inner in block.operations:
                inner.type = "einsum" if inner.type == "linear" else inner.type

    with pytest.raises(LoweringError, match=r"MIL op 'einsum' .* is not one that the evaluator knows"):
        Evaluator(tampered(branching, tmp_path, rename), rounding=Rounding.NONE)


def tampered(saved: Path, folder: Path, change: Callable[[Any], None]) -> Path:
    """A copy of ``saved`` in which ``change`` was applied to every operation of the program."""
    path = folder / "tampered.mlpackage"
    shutil.copytree(saved, path)
    file = path / "Data" / "com.apple.CoreML" / "model.mlmodel"
    model = Model_pb2.Model()
    model.ParseFromString(file.read_bytes())
    function = model.mlProgram.functions["main"]
    for operation in function.block_specializations[function.opset].operations:
        change(operation)
    file.write_bytes(model.SerializeToString())
    return path


def weights() -> Tensor:
    return CODES.float() * 0.25


def test_a_package_computes_its_program_and_its_state_outlives_a_call(saved: Path) -> None:
    evaluate = Evaluator(saved, rounding=Rounding.NONE)
    x = torch.from_numpy(random(1, 1, 16))
    first = evaluate({"x": x})["y"]
    torch.testing.assert_close(first, x @ weights().T / 3)
    torch.testing.assert_close(evaluate({"x": x})["y"], 2 * first)


def test_float16_results_are_rounded_in_one_mode_only(saved: Path) -> None:
    x = torch.from_numpy(random(1, 1, 16))
    exact = Evaluator(saved, rounding=Rounding.NONE)({"x": x})["y"]
    rounded = Evaluator(saved, rounding=Rounding.FP16)({"x": x})["y"]
    assert not torch.equal(exact, exact.half().float())
    assert torch.equal(rounded, ((x.half().float() @ weights().T).half().float() / 3).half().float())


def test_an_unknown_op_is_named(saved: Path, tmp_path: Path) -> None:
    def rename(operation: Any) -> None:
        operation.type = "einsum" if operation.type == "linear" else operation.type

    with pytest.raises(LoweringError, match=r"MIL op 'einsum' \(product\) is not one that the evaluator knows"):
        Evaluator(tampered(saved, tmp_path, rename), rounding=Rounding.NONE)


def test_an_unknown_argument_is_named(saved: Path, tmp_path: Path) -> None:
    def add_argument(operation: Any) -> None:
        if operation.type == "linear":
            operation.inputs["scale"].CopyFrom(operation.inputs["bias"])

    evaluate = Evaluator(tampered(saved, tmp_path, add_argument), rounding=Rounding.NONE)
    with pytest.raises(LoweringError, match=r"'linear'.*unexpected keyword argument 'scale'"):
        evaluate({"x": torch.zeros(1, 1, 16)})


def test_a_result_of_another_shape_than_declared_is_an_error(saved: Path, tmp_path: Path) -> None:
    def widen(operation: Any) -> None:
        if operation.type == "linear":
            operation.outputs[0].type.tensorType.dimensions[2].constant.size = 9

    evaluate = Evaluator(tampered(saved, tmp_path, widen), rounding=Rounding.NONE)
    with pytest.raises(LoweringError, match=r"product has shape \[1, 1, 8\], the program declares \[1, \?, 9\]"):
        evaluate({"x": torch.zeros(1, 1, 16)})


def test_an_input_of_another_rank_than_declared_is_an_error(saved: Path) -> None:
    with pytest.raises(LoweringError, match=r"x has shape \[1, 16\]"):
        Evaluator(saved, rounding=Rounding.NONE)({"x": torch.zeros(1, 16)})


def test_an_op_that_mixes_float_types_is_an_error(saved: Path, tmp_path: Path) -> None:
    def feed_the_uncast_product(operation: Any) -> None:
        if operation.type == "mul":
            operation.inputs["x"].arguments[0].name = "product"

    with pytest.raises(LoweringError, match="mixes FLOAT16, FLOAT32"):
        Evaluator(tampered(saved, tmp_path, feed_the_uncast_product), rounding=Rounding.NONE)


def test_a_value_of_more_dimensions_than_core_ml_takes_is_an_error(saved: Path, tmp_path: Path) -> None:
    def deepen(operation: Any) -> None:
        if operation.type == "mul":
            operation.outputs[0].type.tensorType.dimensions.extend(
                [operation.outputs[0].type.tensorType.dimensions[0]] * 3
            )

    with pytest.raises(LoweringError, match="has 6 dimensions, Core ML takes 5"):
        Evaluator(tampered(saved, tmp_path, deepen), rounding=Rounding.NONE)


def test_a_value_that_nothing_computes_is_an_error(saved: Path, tmp_path: Path) -> None:
    def cut(operation: Any) -> None:
        if operation.type == "mul":
            operation.inputs["x"].arguments[0].name = "nowhere"

    evaluate = Evaluator(tampered(saved, tmp_path, cut), rounding=Rounding.NONE)
    with pytest.raises(LoweringError, match="value nowhere is used before it is computed"):
        evaluate({"x": torch.zeros(1, 1, 16)})


def test_codes_lie_in_the_file_two_to_a_byte_low_nibble_first(saved: Path) -> None:
    """Which is how the reader takes them: the program above would not compute otherwise."""
    contents = (saved / "Data" / "com.apple.CoreML" / "weights" / "weight.bin").read_bytes()
    assert pack_int4(CODES).numpy().tobytes() in contents


def test_a_weight_file_without_its_record_is_damaged(saved: Path, tmp_path: Path) -> None:
    path = tampered(saved, tmp_path, lambda _: None)
    file = path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    file.write_bytes(file.read_bytes().replace(b"\xef\xbe\xad\xde", b"\0\0\0\0"))
    with pytest.raises(InputError, match="there is no record at byte"):
        Evaluator(path, rounding=Rounding.NONE)({"x": torch.zeros(1, 1, 16)})


def test_a_weight_file_cut_off_is_damaged(saved: Path, tmp_path: Path) -> None:
    path = tampered(saved, tmp_path, lambda _: None)
    file = path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    file.write_bytes(file.read_bytes()[:130])
    with pytest.raises(InputError, match="damaged"):
        Evaluator(path, rounding=Rounding.NONE)({"x": torch.zeros(1, 1, 16)})


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no Core ML model"):
        Evaluator(tmp_path / "nothing.mlpackage", rounding=Rounding.NONE)
