"""The MIL evaluator: a saved package, computed op by op in torch, where there is no Core ML to run it.

It covers the ops that our packages hold; any other op, and any argument that is not known here, is an error and never
skipped. It refuses what Core ML would refuse: shapes that torch would silently broadcast are compared, and every result
with the type that the program declares for it.

What it shows is that the file computes the model. It knows nothing of a device's kernels, memory or speed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from exporter.errors import LoweringError
from targets.coreml.package import CODED, TABLED, MilType, Package

KEEP_BYTES = 2 << 30
"""Decoded constants kept between calls, up to this size; what does not fit is decoded again at each call."""

BLOCK_BYTES = 64 << 20
"""Of a matrix in float32 at a time: of a larger one that is not kept, a linear decodes so many rows after another."""


_FLOATS = (MilType.FLOAT16, MilType.FLOAT32)
_NARROW = (MilType.UINT16, MilType.INT16)
_MOST_DIMENSIONS = 5
"""Of a value, but for constants that are decoded: coremltools' pass ``expand_high_rank_reshape_and_transpose`` is there
because Core ML knows no others."""
_FREE = {"layer_norm": ("gamma", "beta", "epsilon")}
"""Arguments that may be of another float type than the op's first (iOS 17's ``layer_norm``: type domains T and U)."""


class Rounding(Enum):
    FP16 = "whatever the program declares as float16: results of ops, decoded weights, states"
    NONE = "nothing: float32 throughout"


class State:
    """A tensor that outlives a call."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.value = torch.zeros(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A constant [N, K], or [N, K, 1, 1] of a convolution, that is decoded where it is read, by rows."""

    shape: tuple[int, ...]
    decode: Callable[[slice | Tensor], Tensor]
    """Of the rows asked for (int64 ``[n]``): float32 ``[n, K]`` or ``[n, K, 1, 1]``."""

    def __len__(self) -> int:
        return self.shape[0]

    def blocks(self) -> Iterator[Tensor]:
        count, columns = self.shape[0], math.prod(self.shape[1:])
        step = max(1, BLOCK_BYTES // (4 * columns))
        return (self.decode(slice(start, start + step)) for start in range(0, count, step))


class Kept:
    """Decoded constants of one or more evaluators, up to ``KEEP_BYTES`` of them in all."""

    def __init__(self) -> None:
        self.values: dict[Any, Any] = {}
        self.size_bytes = 0


class Evaluator:
    """One function of a loaded package with its states. Floats are float32 tensors, holding float16 values where they
    are rounded.

    Functions of one package may share their ``states`` (by name), and any evaluators what they have ``kept``.
    """

    def __init__(
        self,
        path: Path,
        *,
        rounding: Rounding,
        function: str = "main",
        states: Mapping[str, State] | None = None,
        kept: Kept | None = None,
    ) -> None:
        self._package = Package(path, function)
        self._rounding = rounding
        self._constants: dict[str, Any] = {}
        for operation in _everywhere(self._package.operations):
            if operation.type in ("const", *CODED):
                self._constants[operation.outputs[0].name] = operation
        self._operations = [one for one in self._package.operations if one.type not in ("const", *CODED)]
        self._keys = {name: self._package.key(operation) for name, operation in self._constants.items()}
        self._kept = kept or Kept()
        self._inputs = [value for value in self._package.inputs if not _is_state(value)]
        shapes = {
            value.name: _static_shape(value.type.stateType.wrappedType.tensorType)
            for value in self._package.inputs
            if _is_state(value)
        }
        self.states = {name: states[name] if states else State(shape) for name, shape in shapes.items()}
        for name, state in self.states.items():
            if tuple(state.value.shape) != shapes[name]:
                raise _fault(f"state {name} is {list(state.value.shape)}, function {function} has {list(shapes[name])}")
        _refuse_what_core_ml_would(self._package)
        self._dead_after = _last_uses(self._operations, keep={*self._package.outputs, *self.states})

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor], *, watched: Collection[str] = ()) -> dict[str, Tensor]:
        """One prediction: named inputs to named outputs, and to the values inside that are ``watched``, with the states
        changed on the way. Raises LoweringError."""
        values: dict[str, Any] = dict(self.states)
        for declared in self._inputs:
            values[declared.name] = self._checked(inputs[declared.name], declared, moved=False)
        for operation, dead in zip(self._operations, self._dead_after, strict=True):
            self._execute(operation, values)
            for name in dead:
                if name not in watched:
                    values.pop(name, None)  # constants are kept apart
        return {name: values[name] for name in (*self._package.outputs, *watched)}

    def _execute(self, operation: Any, values: dict[str, Any]) -> None:
        if operation.type == BRANCH:
            self._branch(operation, values)
            return
        function = OPS[operation.type]
        by_rows = _BY_ROWS.get(operation.type)
        arguments = {
            key: self._argument(argument, values, by_rows=key == by_rows) for key, argument in operation.inputs.items()
        }
        try:
            inspect.signature(function).bind(**arguments)
            results = function(**arguments)
            results = results if isinstance(results, tuple) else (results,)
            for declared, result in zip(operation.outputs, results, strict=True):
                values[declared.name] = self._checked(result, declared, moved=operation.type in _MOVES)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise _fault(f"MIL op {_describe(operation)} cannot be computed: {error}") from error

    def _branch(self, operation: Any, values: dict[str, Any]) -> None:
        """Of two blocks the one that the predicate says; what it computes is forgotten, but for its results."""
        predicate = self._argument(operation.inputs["pred"], values, by_rows=False)
        if predicate.dtype != torch.bool or predicate.dim():
            raise _fault(f"MIL op {_describe(operation)} branches on {predicate.dtype} {list(predicate.shape)}")
        block = operation.blocks[0 if predicate else 1]
        own = dict(values)
        for inner in block.operations:
            if inner.type not in ("const", *CODED):
                self._execute(inner, own)
        for declared, name in zip(operation.outputs, block.outputs, strict=True):
            values[declared.name] = self._checked(self._value(name, own, by_rows=False), declared, moved=True)

    def _argument(self, argument: Any, values: Mapping[str, Any], *, by_rows: bool) -> Any:
        bound = [
            self._package.constant(binding.value)
            if binding.WhichOneof("binding") == "value"
            else self._value(binding.name, values, by_rows=by_rows)
            for binding in argument.arguments
        ]
        return bound[0] if len(bound) == 1 else bound

    def _value(self, name: str, values: Mapping[str, Any], *, by_rows: bool) -> Any:
        """A value, or a constant: decoded and kept if there is room, else as ``Rows`` where the op takes them."""
        if name in values:
            return values[name]
        if name not in self._constants:
            raise _fault(f"value {name} is used before it is computed")
        operation = self._constants[name]
        key = self._keys[name]
        if key in self._kept.values:
            return self._kept.values[key]
        size = 4 * math.prod(_static_shape(operation.outputs[0].type.tensorType))
        if self._kept.size_bytes + size > KEEP_BYTES:
            return self._rows(operation) if by_rows else self._decode(operation)
        self._kept.values[key] = self._decode(operation)
        self._kept.size_bytes += size
        return self._kept.values[key]

    def _decode(self, operation: Any) -> Any:
        if operation.type in CODED:
            return self._decompressed(operation, self._parts(operation), whole=True)
        value = self._package.constant(operation.attributes["val"])
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    def _rows(self, operation: Any) -> Rows:
        """Of a constant matrix of floats or codes."""
        if operation.type in CODED:
            parts = self._parts(operation)
            shape = tuple(parts["indices" if operation.type == TABLED else "data"].shape)
            if shape != _static_shape(operation.outputs[0].type.tensorType):
                raise _wrong_shape(list(shape), operation.outputs[0])

            def decode(which: slice | Tensor) -> Tensor:
                some = {key: part[which] for key, part in parts.items()}
                return self._decompressed(operation, some, whole=False)
        else:
            value = self._package.constant(operation.attributes["val"])
            shape = tuple(value.shape)

            def decode(which: slice | Tensor) -> Tensor:
                return value[which].float()

        return Rows(shape=shape, decode=decode)

    def _parts(self, operation: Any) -> dict[str, Tensor]:
        """The arguments of ``decompress`` as they are stored, or of ``look_up`` with a table for each row."""
        parts = {key: self._package.constant(a.arguments[0].value) for key, a in operation.inputs.items()}
        if operation.type == TABLED:
            rows, tables = len(parts["indices"]), len(parts["lut"])
            if rows % tables:
                raise _fault(
                    f"constant {operation.outputs[0].name} has {rows} rows, which {tables} tables do not divide"
                )
            parts["lut"] = parts["lut"].repeat_interleave(rows // tables, dim=0)
        return parts

    def _decompressed(self, operation: Any, parts: Mapping[str, Tensor], *, whole: bool) -> Tensor:
        declared = operation.outputs[0]
        try:
            decoded = (look_up if operation.type == TABLED else decompress)(**parts)
        except (TypeError, ValueError, RuntimeError) as error:
            raise _fault(f"constant {declared.name} cannot be decompressed: {error}") from error
        return self._checked(decoded, declared, moved=False) if whole else self._rounded(decoded, declared)

    def _checked(self, value: Tensor, declared: Any, *, moved: bool) -> Tensor:
        """``value``, rounded as its declared type asks. Raises LoweringError where it is not of the declared shape."""
        tensor_type = declared.type.tensorType
        wanted = [d.constant.size if d.WhichOneof("dimension") == "constant" else None for d in tensor_type.dimensions]
        found = list(value.shape)
        if len(found) != len(wanted) or any(w not in (None, f) for w, f in zip(wanted, found, strict=True)):
            raise _wrong_shape(found, declared)
        if (tensor_type.dataType in _FLOATS) != value.is_floating_point():
            raise _fault(f"{declared.name} is {value.dtype}, the program declares {MilType.Name(tensor_type.dataType)}")
        return value if moved else self._rounded(value, declared)

    def _rounded(self, value: Tensor, declared: Any) -> Tensor:
        if declared.type.tensorType.dataType != MilType.FLOAT16 or self._rounding is Rounding.NONE:
            return value
        return value.half().float()


def decompress(*, data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """``constexpr_blockwise_shift_scale``: codes int8 [N, K, ...] less offsets int8 [N, K / g, ...], times float16
    scales of that shape, exact in float32."""
    if offset is not None and offset.shape != scale.shape:
        raise ValueError(f"offsets {list(offset.shape)} and scales {list(scale.shape)} differ")
    blocks = [size // count for size, count in zip(data.shape, scale.shape, strict=True)]
    if any(block * count != size for block, count, size in zip(blocks, scale.shape, data.shape, strict=True)):
        raise ValueError(f"scales {list(scale.shape)} do not divide codes {list(data.shape)}")
    codes = data.float().view([size for pair in zip(scale.shape, blocks, strict=True) for size in pair])
    by_block = [size for count in scale.shape for size in (count, 1)]
    if offset is not None:
        codes.sub_(offset.view(by_block))
    return codes.mul_(scale.float().view(by_block)).view(data.shape)


def look_up(*, indices: Tensor, lut: Tensor) -> Tensor:
    """``constexpr_lut_to_dense``: of indices int8 [N, K, ...] what the float16 table of their row has there; tables are
    [N, 1, ..., V, 1], with one value for an index."""
    rows, values = len(indices), lut.shape[-2]
    if tuple(lut.shape) != (rows, *[1] * (indices.dim() - 1), values, 1):
        raise ValueError(f"tables {list(lut.shape)} do not go with the rows of indices {list(indices.shape)}")
    return lut.float().view(rows, values).gather(1, indices.flatten(1).long()).view(indices.shape)


def _elementwise(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def apply(*, x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    return apply


def _linear(*, x: Tensor, weight: Tensor | Rows, bias: Tensor) -> Tensor:
    if x.shape[-1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        raise ValueError(f"x {list(x.shape)}, weight {list(weight.shape)} and bias {list(bias.shape)} do not fit")
    if isinstance(weight, Rows):
        return torch.cat([F.linear(x, block) for block in weight.blocks()], dim=-1) + bias
    return F.linear(x, weight, bias)


def _gather(*, x: Tensor | Rows, indices: Tensor, axis: Tensor, batch_dims: Tensor, validate_indices: Tensor) -> Tensor:
    if batch_dims != 0 or validate_indices or (axis != 0 and (isinstance(x, Rows) or indices.dim() != 1)):
        raise ValueError("only rows are gathered by indices of any shape, and by none that are checked")
    size = x.shape[int(axis)]
    if indices.amin() < 0 or indices.amax() >= size:
        raise ValueError(f"indices {indices.amin()} to {indices.amax()} are outside of {size}")
    if isinstance(x, Rows):
        return x.decode(indices.flatten()).view(*indices.shape, *x.shape[1:])
    return x[indices] if axis == 0 else x.index_select(int(axis), indices)


def _conv(
    *,
    x: Tensor,
    weight: Tensor | Rows,
    strides: Tensor,
    pad_type: str,
    pad: Tensor,
    dilations: Tensor,
    groups: Tensor,
) -> Tensor:
    """A 1x1 convolution: a linear at each place of [B, K, height, width]."""
    if len(weight.shape) != 4 or tuple(weight.shape[2:]) != (1, 1) or groups != 1 or pad_type != "valid":
        raise ValueError(f"a convolution of {list(weight.shape)} in {int(groups)} groups, padded {pad_type}")
    if any(strides != 1) or any(dilations != 1) or any(pad):
        raise ValueError("a 1x1 convolution that skips or pads")
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {list(x.shape)} and weight {list(weight.shape)} do not fit")
    blocks = weight.blocks() if isinstance(weight, Rows) else iter([weight])
    channels_last = x.movedim(1, -1)
    return torch.cat([F.linear(channels_last, block.flatten(1)) for block in blocks], dim=-1).movedim(-1, 1)


def _matmul(*, x: Tensor, y: Tensor, transpose_x: Tensor, transpose_y: Tensor) -> Tensor:
    if x.shape[:-2] != y.shape[:-2]:
        raise ValueError(f"x {list(x.shape)} and y {list(y.shape)} differ in batch dimensions")
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def _layer_norm(*, x: Tensor, axes: Tensor, gamma: Tensor, beta: Tensor | None = None, epsilon: Tensor) -> Tensor:
    """Over one axis; computed whole before its result is rounded."""
    (axis,) = axes.tolist()
    for what, vector in (("gains", gamma), ("offsets", beta)):
        if vector is not None and vector.shape != (x.shape[axis],):
            raise ValueError(f"{what} {list(vector.shape)} do not fit axis {axis} of {list(x.shape)}")
    last = x.movedim(axis, -1)
    return F.layer_norm(last, last.shape[-1:], weight=gamma, bias=beta, eps=float(epsilon)).movedim(-1, axis)


def _gelu(*, x: Tensor, mode: str) -> Tensor:
    if mode != "EXACT":
        raise ValueError(f"gelu of mode {mode}, EXACT was expected")
    return F.gelu(x)


def _cast(*, x: Tensor, dtype: str) -> Tensor:
    """Between float16 and float32, or from truth to 0 and 1: rounding is for the declared type of the result."""
    if dtype not in ("fp16", "fp32") or not (x.is_floating_point() or x.dtype == torch.bool):
        raise ValueError(f"a cast from {x.dtype} to {dtype}")
    return x.float()


def _concat(*, values: Sequence[Tensor], axis: Tensor, interleave: Tensor) -> Tensor:
    if interleave:
        raise ValueError("interleaved concatenation")
    return torch.cat(list(values), dim=int(axis))


def _slice_by_size(*, x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
    starts, sizes = begin.tolist(), size.tolist()
    if any(s < 0 or n < 1 or s + n > whole for s, n, whole in zip(starts, sizes, x.shape, strict=True)):
        raise ValueError(f"{sizes} from {starts} does not lie within {list(x.shape)}")
    return x[tuple(slice(start, start + count) for start, count in zip(starts, sizes, strict=True))]


def _slice_update(*, x: Tensor, update: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    starts, ends = begin.tolist(), end.tolist()
    sizes = [stop - start for start, stop in zip(starts, ends, strict=True)]
    if sizes != list(update.shape):
        raise ValueError(f"an update of shape {list(update.shape)} does not fill {starts} to {ends}")
    if any(start < 0 or stop > whole for start, stop, whole in zip(starts, ends, x.shape, strict=True)):
        raise ValueError(f"{starts} to {ends} does not lie within {list(x.shape)}")
    result = x.clone()
    result[tuple(slice(start, stop) for start, stop in zip(starts, ends, strict=True))] = update
    return result


def _reshape(*, x: Tensor, shape: Tensor) -> Tensor:
    sizes = shape.tolist()
    if 0 in sizes:
        raise ValueError("a size of 0 copies a dimension in MIL, and no package of ours asks for it")
    return x.reshape(sizes)


def _split(*, x: Tensor, num_splits: Tensor, axis: Tensor) -> tuple[Tensor, ...]:
    if x.shape[int(axis)] % int(num_splits):
        raise ValueError(f"{list(x.shape)} does not split into {int(num_splits)} equal parts")
    return x.chunk(int(num_splits), dim=int(axis))


def _pad(*, x: Tensor, pad: Tensor, mode: str, constant_val: Tensor) -> Tensor:
    if mode != "constant" or len(pad) != 2:
        raise ValueError(f"padding of mode {mode} by {pad.tolist()}, the last axis by a constant was expected")
    return F.pad(x, pad.tolist(), value=constant_val.item())


def _expand_dims(*, x: Tensor, axes: Tensor) -> Tensor:
    for axis in axes.tolist():
        x = x.unsqueeze(axis)
    return x


def _squeeze(*, x: Tensor, axes: Tensor) -> Tensor:
    if any(x.shape[axis] != 1 for axis in axes.tolist()):
        raise ValueError(f"{list(x.shape)} is not 1 at {axes.tolist()}")
    return x.squeeze(tuple(axes.tolist()))


def _attention(*, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(query key^T / sqrt(D) + mask) value, over [B, H, ...] that must be equal: MIL broadcasts no head."""
    if attn_mask is None:
        attn_mask = torch.zeros(query.shape[-2], key.shape[-2])
    batches = {tuple(tensor.shape[:-2]) for tensor in (query, key, value)}
    if len(batches) != 1:
        raise ValueError(f"query, key and value differ in batch dimensions: {sorted(batches)}")
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise ValueError(f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)} do not fit")
    if list(attn_mask.shape[-2:]) != [query.shape[-2], key.shape[-2]]:
        raise ValueError(f"mask {list(attn_mask.shape)} does not fit {query.shape[-2]} queries, {key.shape[-2]} keys")
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + attn_mask
    return scores.softmax(dim=-1) @ value


def _topk(
    *, x: Tensor, k: Tensor, axis: Tensor, ascending: Tensor, sort: Tensor, return_indices: Tensor, **_: Any
) -> tuple[Tensor, ...]:
    if ascending or not sort or not return_indices:
        raise ValueError("only the largest are taken, in order and with their places")
    values, places = x.topk(int(k), dim=int(axis))
    return values, places.int()


def _write_state(*, input: State, data: Tensor) -> tuple[()]:
    if data.shape != input.value.shape:
        raise ValueError(f"{list(data.shape)} is written to a state of {list(input.value.shape)}")
    input.value = data
    return ()


def _static_shape(tensor_type: Any) -> tuple[int, ...]:
    return tuple(dimension.constant.size for dimension in tensor_type.dimensions)


def _is_state(value: Any) -> bool:
    return bool(value.type.WhichOneof("type") == "stateType")


def _describe(operation: Any) -> str:
    name = operation.outputs[0].name if operation.outputs else "no output"
    return f"{operation.type!r} ({name})"


def _names(operation: Any, *, leave_out: Mapping[str, Collection[str]] | None = None) -> Iterator[str]:
    """Of the values that an operation reads; ``leave_out``: but not as these arguments of an op."""
    for key, argument in operation.inputs.items():
        if leave_out and key in leave_out.get(operation.type, ()):
            continue
        for binding in argument.arguments:
            if binding.WhichOneof("binding") == "name":
                yield binding.name
    for block in operation.blocks:
        yield from block.outputs
        for inner in block.operations:
            yield from _names(inner)


def _everywhere(operations: Iterable[Any]) -> Iterator[Any]:
    """Operations with those of their branches before them."""
    for operation in operations:
        for block in operation.blocks:
            yield from _everywhere(block.operations)
        yield operation


def _last_uses(operations: Sequence[Any], *, keep: set[str]) -> list[list[str]]:
    """For each operation, the values that nothing reads after it."""
    last = {name: index for index, operation in enumerate(operations) for name in _names(operation)}
    dead: list[list[str]] = [[] for _ in operations]
    for name, index in last.items():
        if name not in keep:
            dead[index].append(name)
    return dead


def _refuse_what_core_ml_would(package: Package) -> None:
    """Raises LoweringError for an op outside the table, one whose result has too many dimensions, and one that mixes
    float types: none converts them."""
    floats = {value.name: value.type.tensorType.dataType for value in package.inputs if not _is_state(value)}
    for operation in _everywhere(package.operations):
        if operation.type not in ("const", *CODED, *OPS, BRANCH):
            raise _fault(f"MIL op {_describe(operation)} is not one that the evaluator knows: {', '.join(OPS)}")
        floats |= {value.name: value.type.tensorType.dataType for value in operation.outputs}
        rank = max((len(value.type.tensorType.dimensions) for value in operation.outputs), default=0)
        if rank > _MOST_DIMENSIONS:
            raise _fault(
                f"MIL op {_describe(operation)} has {rank} dimensions, Core ML takes {_MOST_DIMENSIONS} at most"
            )
        if operation.type == "gather" and any(floats.get(name) in _NARROW for name in _names(operation)):
            raise _fault(f"MIL op {_describe(operation)} looks up rows by 16-bit numbers: they end at 65,535")
        if operation.type == BRANCH:
            continue
        kinds = {floats[name] for name in _names(operation, leave_out=_FREE) if floats.get(name) in _FLOATS}
        if len(kinds) > 1:
            found = ", ".join(sorted(MilType.Name(kind) for kind in kinds))
            raise _fault(f"MIL op {_describe(operation)} mixes {found}")


def _wrong_shape(found: list[int], declared: Any) -> LoweringError:
    wanted = (
        str(d.constant.size) if d.WhichOneof("dimension") == "constant" else "?"
        for d in declared.type.tensorType.dimensions
    )
    return _fault(f"{declared.name} has shape {found}, the program declares [{', '.join(wanted)}]")


def _fault(found: str) -> LoweringError:
    return LoweringError(found, hint="this is a fault of llama-export: please report it with the model's config.json")


OPS: dict[str, Callable[..., Any]] = {
    "add": _elementwise(torch.add),
    "cast": _cast,
    "concat": _concat,
    "conv": _conv,
    "equal": _elementwise(torch.eq),
    "expand_dims": _expand_dims,
    "gather": _gather,
    "gelu": _gelu,
    "greater": _elementwise(torch.gt),
    "greater_equal": _elementwise(torch.ge),
    "identity": lambda *, x: x,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "matmul": _matmul,
    "maximum": _elementwise(torch.maximum),
    "minimum": _elementwise(torch.minimum),
    "mul": _elementwise(torch.mul),
    "pad": _pad,
    "read_state": lambda *, input: input.value,
    "reduce_max": lambda *, x, axes, keep_dims: x.amax(dim=axes.tolist(), keepdim=bool(keep_dims)),
    "reduce_mean": lambda *, x, axes, keep_dims: x.mean(dim=axes.tolist(), keepdim=bool(keep_dims)),
    "reduce_min": lambda *, x, axes, keep_dims: x.amin(dim=axes.tolist(), keepdim=bool(keep_dims)),
    "reshape": _reshape,
    "rsqrt": lambda *, x, epsilon: (x + epsilon).rsqrt(),
    "scaled_dot_product_attention": _attention,
    "sigmoid": lambda *, x: x.sigmoid(),
    "shape": lambda *, x: torch.tensor(x.shape, dtype=torch.int32),
    "silu": lambda *, x: F.silu(x),
    "slice_by_size": _slice_by_size,
    "slice_update": _slice_update,
    "softmax": lambda *, x, axis: x.softmax(dim=int(axis)),
    "split": _split,
    "square": lambda *, x: x * x,
    "squeeze": _squeeze,
    "sub": _elementwise(torch.sub),
    "tanh": lambda *, x: x.tanh(),
    "tile": lambda *, x, reps: x.repeat(reps.tolist()),
    "topk": _topk,
    "transpose": lambda *, x, perm: x.permute(perm.tolist()),
    "write_state": _write_state,
}
"""MIL op -> what it computes, with the parameter names of MIL; the definitions are in coremltools' ``iOS15`` to
``iOS18`` op modules (``coremltools.converters.mil.mil.ops.defs``)."""

BRANCH = "cond"

_BY_ROWS = {"conv": "weight", "gather": "x", "linear": "weight"}
"""The argument that an op takes by ``Rows``, too."""

_MOVES = frozenset(
    {
        *("concat", "expand_dims", "identity", "read_state", "reshape", "slice_by_size", "slice_update"),
        *("split", "squeeze", "tile", "transpose"),
    }
)
"""Ops that only move numbers, which are rounded already."""
