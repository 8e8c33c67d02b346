"""The layer-by-layer driver: fills a WeightStore, one decoder layer in memory at a time, resuming where it stopped.

Two streams of hidden states go through the model side by side: what the model computes, and what it computes with the
codes chosen so far. Each group of linears is fitted to give what the first stream asks for from what the second one
brings, so that a layer also makes up for those before it.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from calibration.anatomy import Group, Layer, dissect
from calibration.awq import awq_factors
from calibration.gptq import SWEEPS, Curvature, factor, gptq, gptq_palette
from calibration.ledger import Ledger
from calibration.palettes import palettize
from calibration.ranges import Range, RangeObserver, ranges_to_json
from calibration.rtn import round_to_nearest, row_blocks
from calibration.smooth import smooth_factors
from exporter.checkpoint import Checkpoint
from exporter.model.eager import eager_table
from exporter.model.graph import Graph, Observer, Value, Weight
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.quantized import CodedTensor
from exporter.spec import EMBEDDING, ROUTER, Method, Precision, Progress, Recipe, WeightScheme
from exporter.store import Part, StoreKey, TensorError, WeightStore, finite

PROPAGATION = 0.75
"""How much of the error that earlier layers have left a linear is asked to make up for: of the error in its input
(alpha of QEP, Arai and Ichikawa 2025, arXiv:2504.09629), and of that in what its output is added to. All of it fits the
text of calibration better and other text worse."""

_TOKENS_PER_COLUMN = 4
"""Fewer tokens than this for each column of a linear say nothing of an error that other text would show too: on the
bundled model 1.3 tokens per column made propagation worse than none (KL 2.4e-2 for 1.6e-2), 2.7 still (1.5e-2 for
1.3e-2), 8 better (1.05e-2 for 1.11e-2)."""

TOKENS_AT_ONCE = 2048
"""Of the hidden states that are in float32 within a layer at a time."""

RESIDENT_BYTES = 512 << 20
"""Hidden states of both streams up to which they stay in memory; beyond, they lie in a file and are mapped."""

FOLD_TOKENS = 4096
"""Tokens that fold factors are chosen on: a grid of few candidates needs no more."""

ENDS_TOKENS = 2048
"""Tokens that the ranges of last norm and logits are taken over."""

_FEWEST = 4
"""GPTQ wants at least K / 4 tokens for K columns; a linear that sees fewer, such as an expert that is seldom chosen, is
rounded to nearest: its Hessian would say more of the damping than of the text."""


ROUNDED = Recipe(method=Method.ROUND)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationText:
    """Windows of tokens, and what identifies them before they are made."""

    identity: str
    source: str
    """For people: a file's name, or ``written by the model``."""
    windows: Callable[[], Tensor]
    """int64 ``[W, T]``"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How codes are chosen by what the model does with a text."""

    recipe: Recipe
    text: CalibrationText
    graph: Graph


class Silent:
    """A ``Progress`` that nobody watches."""

    def stage(self, title: str) -> None: ...

    def advance(self, done: int, total: int) -> None: ...

    def note(self, text: str) -> None: ...


SILENT = Silent()


def quantize(
    checkpoint: Checkpoint,
    scheme: WeightScheme,
    *,
    root: Path,
    calibration: Calibration | None = None,
    progress: Progress = SILENT,
) -> tuple[WeightStore, int]:
    """A complete store for ``checkpoint`` under ``scheme`` in the folder ``root``, and how many parts it had to make.

    A part is one decoder layer, or the ends (embedding and head); 0 made means that the whole store was found there.
    Without ``calibration`` everything is rounded to nearest. Raises InputError for a weight or an activation that is
    not finite.
    """
    recipe = calibration.recipe if calibration else ROUNDED
    text = calibration.text.identity if calibration else ""
    key = StoreKey(source_sha256=checkpoint.sha256, scheme=scheme, recipe=recipe, text=text)
    store = WeightStore(checkpoint=checkpoint, key=key, root=root)
    ledger = Ledger()
    parts = [part for part in store.parts if store.quantized_names(part)]
    missing = [layer for layer in parts if not store.part_file(layer).exists()]
    layers = range(checkpoint.spec.num_hidden_layers)
    if calibration and (missing or not all(store.ranges_file(part).exists() for part in (*layers, None))):
        if not store.windows_file.exists():
            store.write_windows(calibration.text.windows())
        _calibrate(store, calibration, ledger=ledger, progress=progress)
    if missing:
        progress.stage("rounding embedding and head" if calibration else f"rounding to {scheme.body}")
        for done, layer in enumerate(parts, start=1):
            if not store.part_file(layer).exists():
                with ledger.stage("rounding"):
                    _round_part(store, layer)
            progress.advance(done, len(parts))
    if missing or (parts and not store.is_summed_up):
        source = calibration.text.source if calibration else ""
        store.write_timings(asdict(ledger))
        if missing:
            progress.note(f"quantized in {ledger}")
        store.write_summary(text_source=source)
    return store, len(missing)


@torch.no_grad()
def _calibrate(store: WeightStore, calibration: Calibration, *, ledger: Ledger, progress: Progress) -> None:
    """Quantize every layer that is missing in the store.

    A layer that is there is only computed, from what is stored: so the layers after it see the same bits as in a run
    that was not stopped.
    """
    windows = store.read_windows()
    count = store.spec.num_hidden_layers
    with tempfile.TemporaryDirectory(prefix="llama-export-") as scratch:
        streams = _Streams.start(store, windows, folder=Path(scratch))
        for index in range(count):
            progress.stage(f"layer {index + 1} of {count}")
            layer = dissect(calibration.graph, index)
            if not store.part_file(index).exists():
                errors = _quantize_layer(layer, streams, store, calibration.recipe, ledger=ledger, progress=progress)
                progress.note(f"layer {index + 1} of {count}: {_summary(errors)}")
            observer = RangeObserver()
            with ledger.stage("forward", flops=2 * _flops(layer, [layer.output], windows.numel())):
                streams.advance(layer, store, observe=observer.on_node)
            store.write_ranges(index, ranges_to_json(observer.ranges()), caches=observer.caches())
        with ledger.stage("forward"):
            store.write_ranges(None, ranges_to_json(_ranges_of_ends(calibration.graph, streams)), caches={})


def _ranges_of_ends(graph: Graph, streams: _Streams) -> dict[str, Range]:
    """Of the last norm and of the logits, over the first ``ENDS_TOKENS``: a head of 128,256 rows takes as long for each
    token as several layers. Both weights are the checkpoint's, since the ends are rounded after all layers."""
    head = graph.head
    (norm,) = (node for node in graph.nodes if Value(node.name) == head.arguments[0])
    (hidden,) = (value for value in norm.arguments if isinstance(value, Value))
    reference = Reference(graph, streams.store.checkpoint, FULL_PRECISION, keep_bytes=0)
    observer = RangeObserver()
    count, length, _ = streams.lossy.shape
    for window in streams.lossy[: min(count, math.ceil(ENDS_TOKENS / length))]:
        (normed,) = reference.compute(norm, {hidden: window.unsqueeze(0)})
        observer.observe(norm.name, normed)
        (logits,) = reference.compute(head, {Value(norm.name): normed})
        observer.observe(head.name, logits)
    return observer.ranges()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Streams:
    """The hidden states before a layer, float32 ``[W, T, H]``: of the model, and of what has become of it."""

    exact: Tensor
    lossy: Tensor
    store: WeightStore

    @classmethod
    def start(cls, store: WeightStore, windows: Tensor, *, folder: Path) -> _Streams:
        """Before the first layer: the embeddings. What would pass ``RESIDENT_BYTES`` lies in files in ``folder``."""
        shape = (*windows.shape, store.spec.hidden_size)
        resident = 2 * 4 * math.prod(shape) <= RESIDENT_BYTES
        states = [
            torch.empty(shape)
            if resident
            else torch.from_file(str(folder / name), shared=True, size=math.prod(shape)).view(shape)
            for name in ("exact", "lossy")
        ]
        table = store.checkpoint.read(EMBEDDING)
        for index, window in enumerate(windows):
            for state in states:
                state[index] = table[window].float()
        return cls(exact=states[0], lossy=states[1], store=store)

    def chunks(self, *, tokens: int | None = None) -> list[slice]:
        """Slices of windows that hold ``TOKENS_AT_ONCE`` tokens between them; of the first ``tokens`` where given."""
        count, length, _ = self.exact.shape
        if tokens:
            count = min(count, math.ceil(tokens / length))
        step = max(1, TOKENS_AT_ONCE // length)
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]

    def compute(
        self,
        layer: Layer,
        wanted: Sequence[Value],
        hidden: Tensor,
        weight: Callable[[str], Tensor],
        observe: Observer | None = None,
    ) -> list[Tensor]:
        """The values ``wanted`` of ``layer`` with ``weight(name)`` in float32."""
        spec = self.store.spec
        table = eager_table(lambda named: weight(named.name))
        sizes = {"head_dim": spec.head_dim, "kv_heads": spec.num_key_value_heads}
        return layer.compute(wanted, table, hidden, **sizes, observe=observe)

    def original(self, name: str) -> Tensor:
        return self.store.checkpoint.read(name).float()

    def advance(self, layer: Layer, store: WeightStore, *, observe: Observer) -> None:
        """Both streams go on to the next layer; ``observe`` sees the lossy one."""
        for chunk in self.chunks():
            (self.exact[chunk],) = self.compute(layer, [layer.output], self.exact[chunk], self.original)
            (self.lossy[chunk],) = self.compute(
                layer, [layer.output], self.lossy[chunk], lambda name: _decoded(store[name]), observe
            )


@dataclass(slots=True)
class _Folded:
    """The weights of one layer as they are to be quantized: factors multiplied in on one side, out on the other."""

    store: WeightStore
    columns: dict[str, Tensor] = field(default_factory=dict)
    """By linear, factors ``[K]`` of its columns."""
    sources: dict[str, Tensor] = field(default_factory=dict)
    """By norm or linear, divisors of its elements or rows."""

    def __getitem__(self, name: str) -> Tensor:
        """float32"""
        return self.apply(name, finite(name, self.store.checkpoint.read(name)))

    def apply(self, name: str, weight: Tensor) -> Tensor:
        weight = weight.float().contiguous()  # an expert may lie transposed
        if name in self.columns:
            weight = weight * self.columns[name]
        if name in self.sources:
            divisors = self.sources[name]
            weight = weight / (divisors if weight.dim() == 1 else divisors.unsqueeze(1))
        return weight


def _quantize_layer(
    layer: Layer, streams: _Streams, store: WeightStore, recipe: Recipe, *, ledger: Ledger, progress: Progress
) -> dict[str, TensorError]:
    """Fold, then quantize group by group as the layer computes them, each seeing what the ones before it have lost."""
    folded = _Folded(store)
    if recipe.method is not Method.GPTQ:
        with ledger.stage("folding"):
            for group in layer.groups:
                _choose_factors(group, layer, streams, folded, recipe)
    done: dict[str, CodedTensor] = {}
    errors: dict[str, TensorError] = {}
    seldom: dict[int, int] = {}
    total = len(store.quantized_names(layer.index))
    for group in layer.groups:
        if not any(store.scheme.precision(name).bits for name in group.linears):
            continue
        moments = _moments(group, layer, streams, folded, done, ledger=ledger)
        second_moment = moments.second
        compensates = recipe.method.compensates and moments.tokens * _FEWEST >= len(second_moment)
        if recipe.method.compensates and not compensates:
            seldom |= {group.expert: moments.tokens} if group.expert is not None else {}
        if compensates:
            with ledger.stage("factoring", flops=2 / 3 * len(second_moment) ** 3):
                curvature = factor(second_moment, damping=recipe.damping, act_order=recipe.act_order)
        for name in group.linears:
            if store.scheme.precision(name).bits is None:
                continue
            weight = target = folded[name]
            flops = 2.0 * weight.numel() * weight.shape[1]
            if compensates:
                with ledger.stage("propagating", flops=3 * flops):
                    target = weight + _propagation(moments) * curvature.solve(
                        weight @ moments.lag + moments.residual_lag
                    )
                with ledger.stage("gptq", flops=(2.5 + 3.5 * SWEEPS) * flops):
                    tensor = _compensated(target, curvature, name, store.scheme)
            else:
                with ledger.stage("rounding"):
                    energy_of_inputs = second_moment.diagonal() if moments.tokens else None
                    tensor = _rounded(weight, name, store.scheme, energy=energy_of_inputs)
            with ledger.stage("measuring", flops=3 * flops):
                plain = _rounded(store.checkpoint.read(name), name, store.scheme).dequantize()
                before = _output_loss(target - folded.apply(name, plain), second_moment)
                after = _output_loss(target - tensor.dequantize(), second_moment)
                energy = _output_loss(target, second_moment)
                errors[name] = TensorError(rounded=before / energy, stored=after / energy) if energy else TensorError()
            done[name] = tensor
            progress.advance(len(done), total)
    if seldom:
        progress.note(_seldom(layer, seldom))
    floats = {name: folded[name] for name in (*folded.sources, *folded.columns) if name not in done}
    store.write_part(layer.index, list(done.values()), errors=errors, floats=floats)
    return errors


def _seldom(layer: Layer, tokens: dict[int, int]) -> str:
    """``tokens`` by expert."""
    some = ", ".join(f"{expert} met {count}" for expert, count in sorted(tokens.items())[:8])
    return (
        f"layer {layer.index + 1}: {len(tokens)} experts met less than a token of the text for every {_FEWEST} columns "
        f"and are rounded to nearest ({some}{', ...' if len(tokens) > 8 else ''}); a longer text may reach them"
    )


def _propagation(moments: _Moments) -> float:
    """``PROPAGATION``, less as tokens are scarce: none of it at ``_TOKENS_PER_COLUMN``, half of it at twice as many."""
    return PROPAGATION * max(0.0, 1.0 - _TOKENS_PER_COLUMN * len(moments.second) / moments.tokens)


def _choose_factors(group: Group, layer: Layer, streams: _Streams, folded: _Folded, recipe: Recipe) -> None:
    """Find the factors of one group, if it has a fold, and enter them on both of its sides."""
    store = folded.store
    readers = (*group.linears, *group.gated)
    coded = [name for name in readers if not name.endswith(ROUTER)]  # whose floats the store keeps with the norms
    if group.fold is None or not all(store.scheme.precision(name).bits for name in coded):
        return
    if len(store.spec.weights()[group.fold.source]) == 2 and not store.scheme.precision(group.fold.source).bits:
        return  # a float matrix is read through from the checkpoint, and so cannot change
    second_moment, largest = torch.zeros(()), torch.zeros(())
    chunks = streams.chunks(tokens=FOLD_TOKENS)
    for chunk in chunks:
        (x,) = streams.compute(layer, [group.input], streams.exact[chunk], streams.original)
        x = x.flatten(0, 1)  # [n, K]
        second_moment = second_moment + x.T @ x
        largest = torch.maximum(largest, x.abs().amax(dim=0))
    second_moment /= sum(chunk.stop - chunk.start for chunk in chunks) * streams.exact.shape[1]
    weights = (finite(name, store.checkpoint.read(name)) for name in coded)
    if recipe.method is Method.SMOOTH:  # which wants the largest of each column
        factors = smooth_factors([weight.abs().amax(dim=0, keepdim=True).float() for weight in weights], largest)
    else:
        coarsest = min(coded, key=lambda name: store.scheme.precision(name).bits or 0)
        factors = awq_factors(
            [_some_rows(weight, count=len(coded)) for weight in weights],
            second_moment,
            rounded=lambda rows: _rounded(rows, coarsest, store.scheme).dequantize(),
        )
    factors = group.fold.tie(factors)
    folded.columns |= dict.fromkeys(readers, factors)
    folded.sources[group.fold.source] = group.fold.source_factors(factors)


def _some_rows(weight: Tensor, *, count: int) -> Tensor:
    """float32: all rows of one matrix of three or fewer, else as many of each as come to those of three together."""
    return weight[:: max(1, count // 3)].float()


@dataclass(slots=True)
class _Moments:
    """Sums over n tokens of the inputs y that a group gets and the inputs x that it should get, K channels, folded."""

    second: Tensor
    """Y^T Y / n, float32 ``[K, K]``"""
    lag: Tensor
    """(X - Y)^T Y / n, float32 ``[K, K]``"""
    residual_lag: Tensor | float
    """The same for what the output is added to, float32 ``[N, K]``; 0 where it is added to nothing."""
    tokens: int


def _moments(
    group: Group,
    layer: Layer,
    streams: _Streams,
    folded: _Folded,
    done: dict[str, CodedTensor],
    *,
    ledger: Ledger,
) -> _Moments:
    factors = folded.columns.get(group.linears[0])
    wanted = [group.input, *([group.residual] if group.residual else [])]

    def present(name: str) -> Tensor:
        return done[name].dequantize() if name in done else folded[name]

    moments: _Moments | None = None
    for chunk in streams.chunks():
        tokens = streams.exact[chunk].shape[0] * streams.exact.shape[1]
        with ledger.stage("forward", flops=2 * _flops(layer, wanted, tokens)):
            exact = streams.compute(layer, wanted, streams.exact[chunk], streams.original)
            lossy = streams.compute(layer, wanted, streams.lossy[chunk], present)
        x, y = exact[0].flatten(0, 1), lossy[0].flatten(0, 1)  # [n, K]
        if factors is not None:
            x = x / factors
        if group.expert is not None:  # tokens that come to it in both streams; another is no error of these linears
            own = x.any(dim=1) & y.any(dim=1)
            x, y, tokens = x[own], y[own], int(own.sum())
        columns = x.shape[1]
        if moments is None:
            residual_lag = torch.zeros(exact[1].shape[2], columns) if group.residual else 0.0
            moments = _Moments(torch.zeros(columns, columns), torch.zeros(columns, columns), residual_lag, 0)
        with ledger.stage("moments", flops=4.0 * tokens * columns**2):
            moments.second.addmm_(y.T, y)
            moments.lag.addmm_((x - y).T, y)
        if isinstance(moments.residual_lag, Tensor):
            with ledger.stage("moments", flops=2.0 * tokens * moments.residual_lag.numel()):
                moments.residual_lag.addmm_((exact[1] - lossy[1]).flatten(0, 1).T, y)
        moments.tokens += tokens
    assert moments is not None  # there is at least one window
    count = max(moments.tokens, 1)  # an expert may have met none
    moments.second /= count
    moments.lag /= count
    moments.residual_lag /= count
    return moments


def _flops(layer: Layer, wanted: list[Value], tokens: int) -> float:
    """Of the linears on the way to ``wanted``, for so many tokens; attention adds a few per cent at 512 positions."""
    nodes = [node for node in layer.needed_for(wanted) if node.op == "linear"]
    return sum(2.0 * tokens * math.prod(a.shape) for node in nodes for a in node.arguments if isinstance(a, Weight))


def _output_loss(error: Tensor, second_moment: Tensor) -> float:
    """Mean squared error of the output, summed over its channels: tr(E H E^T)."""
    return ((error @ second_moment) * error).sum().item()


def _decoded(stored: CodedTensor | Tensor) -> Tensor:
    return stored.float() if isinstance(stored, Tensor) else stored.dequantize()


def _rounded(weight: Tensor, name: str, scheme: WeightScheme, *, energy: Tensor | None = None) -> CodedTensor:
    """``weight`` as ``scheme`` stores the matrix ``name``, each element rounded by itself. ``energy`` (float32 ``[K]``,
    of the input's channels) is what a palette's tables are chosen by."""
    precision = scheme.precision(name)
    if precision is Precision.LUT4:
        return palettize(weight, name=name, energy=energy)
    return round_to_nearest(weight, name=name, **_code_settings(weight, name, scheme))


def _compensated(weight: Tensor, curvature: Curvature, name: str, scheme: WeightScheme) -> CodedTensor:
    """The same, with the error of each column made up for by others."""
    if scheme.precision(name) is Precision.LUT4:
        return gptq_palette(weight, curvature, name=name)
    return gptq(weight, curvature, name=name, **_code_settings(weight, name, scheme))


def _code_settings(weight: Tensor, name: str, scheme: WeightScheme) -> dict[str, int]:
    bits = scheme.precision(name).bits
    assert bits is not None  # nobody asks for floats
    return {"bits": bits, "group_size": scheme.groups(name, columns=weight.shape[1])}


def _summary(errors: dict[str, TensorError]) -> str:
    if not errors:
        return "nothing to quantize"
    before, after = (sum(getattr(e, kind) for e in errors.values()) / len(errors) for kind in ("rounded", "stored"))
    return f"mean output error {before:.2e} rounded, {after:.2e} calibrated"


def _round_part(store: WeightStore, layer: Part) -> None:
    tensors, errors = [], {}
    for name in store.quantized_names(layer):
        weight = finite(name, store.checkpoint.read(name))
        tensor = _rounded(weight, name, store.scheme)
        error = relative_error(weight, tensor)
        errors[name] = TensorError(rounded=error, stored=error)
        tensors.append(tensor)
    store.write_part(layer, tensors, errors=errors, floats={})


def relative_error(weight: Tensor, quantized: CodedTensor) -> float:
    """|W - Q|^2 / |W|^2 in Frobenius norm, in blocks of rows so that no second float copy of W is held."""
    error, total, start = 0.0, 0.0, 0
    for (rows,) in row_blocks(weight):
        exact = rows.float()
        stored = quantized.dequantize(slice(start, start + len(rows)))
        error += stored.sub_(exact).square_().sum().item()
        total += exact.square_().sum().item()
        start += len(rows)
    return error / total if total else 0.0
