"""Which matrices of an int4 body should be int8: those that int4 is measured to hurt most, for the bytes it saves.

What int4 costs a matrix is measured with all others at full precision, and costs are summed. That is sound while they
are small: KL is then quadratic in the change of the logits, and the rounding errors of different matrices are as good
as uncorrelated, so that the mixed terms vanish in the mean. On the bundled model the 28 costs sum up to 1.8e-2 nats,
and all matrices at int4 together lose 1.7e-2. ``meet_kl`` does not rely on it: it measures what it has chosen.

Everything here is rounded to nearest. Calibrated codes lose less, so that a KL foretold here is an upper estimate for
them; but it leaves out what a target rounds in the activations. The quality verdict measures both.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from calibration.anatomy import Layer, dissect
from calibration.layers import TOKENS_AT_ONCE
from calibration.rtn import round_to_nearest
from exporter.checkpoint import Checkpoint
from exporter.errors import BudgetError, InputError, UsageError
from exporter.files import written_whole
from exporter.model.eager import eager_table
from exporter.model.graph import Graph, Node, Value, Weight, walk
from exporter.spec import (
    EMBEDDING,
    GROUP_SIZES,
    HEAD,
    PER_ROW,
    ROUTER,
    ModelSpec,
    Precision,
    Progress,
    Rule,
    WeightScheme,
)

SENSITIVITY_TOKENS = 1024
"""Two windows of 512 rank the matrices well enough. On the bundled model each of eight such pairs ranks them as the
other 14 windows do (rank correlation 0.988 or more), and what is chosen by it loses at most 5 % more than the best
choice by those."""

LEVEL_TOKENS = 4096
"""How large a KL is differs by 15 % between texts of 1024 tokens, and by less than 1 % between the halves of 8192."""

_LOGITS_AT_ONCE = 1 << 22
"""In float64: 32 MiB, and a few temporaries of that size."""

_ROUNDS = 4
"""Times that ``meet_kl`` chooses; each after the first because it has measured more than was foretold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What int8 is worth for one matrix, and what it takes."""

    name: str
    kl_nats: float
    """Mean KL when this matrix alone is int4, less the same with int8. Below zero where int8 is the worse of the two:
    it has one scale per row, which an outlier can spoil."""
    extra_bytes: int
    """Of int8 over int4, codes and scales."""


def open_matrices(spec: ModelSpec, scheme: WeightScheme) -> list[str]:
    """The matrices of an int4 body that no rule speaks of, in the order of the model: int4 until int8 is chosen.

    Raises UsageError for another body.
    """
    if scheme.body is not Precision.INT4:
        raise UsageError(
            f"--budget-mb and --max-kl choose what an int4 model keeps in int8, --precision is {scheme.body}",
            hint="leave them out, or take --precision int4",
        )
    matrices = [name for name, shape in spec.weights().items() if len(shape) == 2 and name not in (EMBEDDING, HEAD)]
    matrices = [name for name in matrices if not name.endswith(ROUTER)]
    return [name for name in matrices if not any(rule.matches(name) for rule in scheme.rules)]


def with_int8(scheme: WeightScheme, spec: ModelSpec, names: Collection[str]) -> WeightScheme:
    """``scheme`` with one more rule, after those that it has, for each matrix of ``names``, in the order of the
    model."""
    patterns = [name.removeprefix("model.").removesuffix(".weight") for name in spec.weights() if name in names]
    added = (Rule(pattern=pattern, precision=Precision.INT8) for pattern in patterns)
    return replace(scheme, rules=(*scheme.rules, *added))


def stored_bytes(spec: ModelSpec, scheme: WeightScheme) -> int:
    """Of all weights as a WeightStore holds them: codes and bf16 scales, float matrices, float32 norms."""
    return sum(_bytes_of(name, shape, scheme) for name, shape in spec.weights().items())


def _bytes_of(name: str, shape: tuple[int, ...], scheme: WeightScheme) -> int:
    count = math.prod(shape)
    if len(shape) == 1:
        return 4 * count
    precision = scheme.precision(name)
    if precision.bits is None:
        return count * {Precision.FP16: 2, Precision.FP32: 4}[precision]
    return count * precision.bits // 8 + 2 * (count // scheme.groups(name, columns=shape[1]))


def refuse_budget(spec: ModelSpec, scheme: WeightScheme, *, budget_bytes: int) -> None:
    """Raises BudgetError where the weights do not fit ``budget_bytes`` even with every open matrix at int4."""
    least = stored_bytes(spec, scheme)
    if least <= budget_bytes:
        return
    columns = [shape[1] for shape in spec.weights().values() if len(shape) == 2]
    coarsest = max((size for size in GROUP_SIZES if not any(count % size for count in columns)), default=PER_ROW)
    embedding = Precision.INT4 if spec.tie_word_embeddings else scheme.embedding
    ways = {
        "leave --rule out": replace(scheme, rules=()),
        "take --head int4": replace(scheme, head=Precision.INT4, embedding=embedding),
        f"take --group-size {coarsest or 'row'}": replace(scheme, group_size=coarsest),
        "take --group-size row": replace(scheme, group_size=PER_ROW),
    }
    sizes = {way: stored_bytes(spec, smaller) for way, smaller in ways.items()}
    fitting = [f"{way} ({_megabytes(size)} MB)" for way, size in sizes.items() if size <= budget_bytes]
    raise BudgetError(
        f"the weights take {_megabytes(least)} MB with as much int4 as these options allow, --budget-mb is "
        f"{budget_bytes / 1e6:g}",
        hint=", or ".join([f"take --budget-mb {_megabytes(least)}", *fitting]),
    )


def choose_within_budget(
    sensitivities: Iterable[Sensitivity], scheme: WeightScheme, spec: ModelSpec, *, budget_bytes: int
) -> tuple[Rule, ...]:
    """The rules of ``scheme`` and one for each matrix that gets int8: those that gain most KL per byte first, passing
    over what no longer fits and what gains nothing.

    Matrices that a rule of ``scheme`` speaks of are left alone. Raises BudgetError as ``refuse_budget`` does.
    """
    refuse_budget(spec, scheme, budget_bytes=budget_bytes)
    room = budget_bytes - stored_bytes(spec, scheme)
    chosen = []
    for matrix in _best_first(sensitivities, scheme, spec):
        if matrix.extra_bytes <= room:
            chosen.append(matrix.name)
            room -= matrix.extra_bytes
    return with_int8(scheme, spec, chosen).rules


def choose_for_kl(
    sensitivities: Iterable[Sensitivity],
    scheme: WeightScheme,
    spec: ModelSpec,
    *,
    max_kl_nats: float,
    int8_kl_nats: float,
    excess: float = 1.0,
) -> tuple[Rule, ...]:
    """The rules of ``scheme`` and one for each matrix that gets int8, so that the mean KL foretold is at most
    ``max_kl_nats``: those that gain most per byte first, until it is; then what has turned out not to be needed is
    taken back, the largest first.

    Foretold is ``int8_kl_nats``, measured with every open matrix at int8, plus ``excess`` times the sum of what int4
    costs the others; ``excess`` is how many times their sum they cost together. Matrices that a rule of ``scheme``
    speaks of are left alone. Raises BudgetError where ``int8_kl_nats`` is too much already.
    """
    _refuse_kl(scheme, max_kl_nats=max_kl_nats, int8_kl_nats=int8_kl_nats)
    useful = _best_first(sensitivities, scheme, spec)
    chosen: set[str] = set()

    def enough(names: set[str]) -> bool:
        cost = math.fsum(matrix.kl_nats for matrix in useful if matrix.name not in names)
        return int8_kl_nats + excess * cost <= max_kl_nats

    for matrix in useful:
        if not enough(chosen):
            chosen.add(matrix.name)
    for matrix in sorted(useful, key=lambda matrix: -matrix.extra_bytes):
        if enough(chosen - {matrix.name}):
            chosen.discard(matrix.name)
    return with_int8(scheme, spec, chosen).rules


def _refuse_kl(scheme: WeightScheme, *, max_kl_nats: float, int8_kl_nats: float) -> None:
    if int8_kl_nats <= max_kl_nats:
        return
    above = 10.0 ** (math.floor(math.log10(int8_kl_nats)) - 1)  # the second digit
    ways = [f"take --max-kl {math.ceil(int8_kl_nats / above) * above:.2g}", "take --precision fp16"]
    if Precision.INT4 in (scheme.head, scheme.embedding):
        ways.append("leave --head int4 out")
    if any(rule.precision is Precision.INT4 for rule in scheme.rules):
        ways.append("leave --rule ... = int4 out")
    raise BudgetError(
        f"the mean KL is {int8_kl_nats:.3g} nats with as much int8 as these options allow, --max-kl is {max_kl_nats:g}",
        hint=", or ".join(ways),
    )


def _best_first(sensitivities: Iterable[Sensitivity], scheme: WeightScheme, spec: ModelSpec) -> list[Sensitivity]:
    """The open matrices that int8 helps, by KL per byte; equals in the order of the model."""
    known = {matrix.name: matrix for matrix in sensitivities}
    useful = [known[name] for name in open_matrices(spec, scheme) if known[name].kl_nats > 0]
    return sorted(useful, key=lambda matrix: -matrix.kl_nats / matrix.extra_bytes)


def meet_budget(
    checkpoint: Checkpoint,
    graph: Graph,
    scheme: WeightScheme,
    windows: Tensor,
    *,
    budget_bytes: int,
    progress: Progress,
    keep: Path | None = None,
) -> tuple[Rule, ...]:
    """Measure, and choose what gets int8 within ``budget_bytes``. Raises as ``measure_sensitivity`` and
    ``choose_within_budget`` do, for a budget that is too small before anything is measured."""
    refuse_budget(checkpoint.spec, scheme, budget_bytes=budget_bytes)
    matrices = measure_sensitivity(checkpoint, graph, scheme, windows, progress=progress, keep=keep)
    rules = choose_within_budget(matrices, scheme, checkpoint.spec, budget_bytes=budget_bytes)
    progress.note(_summary(checkpoint.spec, scheme, rules))
    return rules


def meet_kl(
    checkpoint: Checkpoint,
    graph: Graph,
    scheme: WeightScheme,
    windows: Tensor,
    *,
    max_kl_nats: float,
    progress: Progress,
    keep: Path | None = None,
) -> tuple[Rule, ...]:
    """Rules under which the model, rounded to nearest, was measured to have a mean KL of at most ``max_kl_nats``.

    All int8 and all int4 are measured first: a KL that cannot be met is then refused, and one that needs no int8 met,
    before the matrices are measured one by one. They also give the scale of the sum of their costs, which is of fewer
    tokens. What is chosen is measured as well, and chosen again, with that scale, where it is above. Raises as
    ``measure_sensitivity`` and ``choose_for_kl`` do.
    """
    spec = checkpoint.spec

    def measure(title: str, rules: tuple[Rule, ...]) -> float:
        progress.stage(f"measuring the KL of {title}")
        rounded = replace(scheme, rules=rules)
        return measure_kl(checkpoint, graph, rounded, windows, progress=progress, keep=keep)

    all_int8 = with_int8(scheme, spec, open_matrices(spec, scheme)).rules
    lowest, kl_nats = measure("all int8", all_int8), measure("all int4", scheme.rules)
    rules = scheme.rules
    if kl_nats > max_kl_nats:
        _refuse_kl(scheme, max_kl_nats=max_kl_nats, int8_kl_nats=lowest)
        matrices = measure_sensitivity(checkpoint, graph, scheme, windows, progress=progress, keep=keep)
        targets = {"max_kl_nats": max_kl_nats, "int8_kl_nats": lowest}
        for _ in range(_ROUNDS):
            cost = _cost(matrices, replace(scheme, rules=rules))
            rules = choose_for_kl(matrices, scheme, spec, **targets, excess=(kl_nats - lowest) / cost if cost else 1.0)
            kl_nats = measure("what is chosen", rules)
            if kl_nats <= max_kl_nats:
                break
        else:
            rules, kl_nats = all_int8, lowest
    progress.note(f"{_summary(spec, scheme, rules)}, mean KL {kl_nats:.2g} nats rounded to nearest")
    return rules


def _cost(matrices: Iterable[Sensitivity], scheme: WeightScheme) -> float:
    """Summed over those that are int4 under ``scheme`` and that int8 would help."""
    return math.fsum(max(0.0, m.kl_nats) for m in matrices if scheme.precision(m.name) is Precision.INT4)


def _summary(spec: ModelSpec, scheme: WeightScheme, rules: tuple[Rule, ...]) -> str:
    size = stored_bytes(spec, replace(scheme, rules=rules))
    chosen, total = len(rules) - len(scheme.rules), len(open_matrices(spec, scheme))
    return f"int8 for {chosen} of {total} matrices: {_megabytes(size)} MB of weights"


def _megabytes(size_bytes: int) -> str:
    """Rounded up, so that a budget of as much is enough."""
    return f"{math.ceil(size_bytes / 1e4) / 100:.2f}"


@torch.no_grad()
def measure_sensitivity(
    checkpoint: Checkpoint,
    graph: Graph,
    scheme: WeightScheme,
    windows: Tensor,
    *,
    progress: Progress,
    keep: Path | None = None,
) -> list[Sensitivity]:
    """What int4 costs each open matrix, in the order of the model, on the first ``SENSITIVITY_TOKENS`` of ``windows``
    int64 ``[W, T]``.

    A changed matrix leaves what comes before its layer as it is: the hidden states between the layers are kept (142 MB
    for 16 layers of 2048 channels), and each measurement starts from its own. The weights of one layer are in memory
    at a time, and of the head a block of rows. The file ``keep`` is filled layer by layer, and what is found there is
    not measured again; it is for one checkpoint, scheme and text. Raises UsageError for a body that is not int4,
    InputError for a model that is not finite.
    """
    spec, model = checkpoint.spec, _Model(checkpoint=checkpoint, graph=graph)
    names, windows = open_matrices(spec, scheme), _first(windows, tokens=SENSITIVITY_TOKENS)
    count = spec.num_hidden_layers
    by_layer = [[name for name in names if spec.layer_of(name) == index] for index in range(count)]
    total = sum(2 * len(group) * (count - index + 1) for index, group in enumerate(by_layer))
    done = 0

    def step(times: int) -> None:
        """A layer, or the head, was computed for so many matrices and precisions."""
        nonlocal done
        done += times
        progress.advance(done, total)

    progress.stage("measuring which layers int4 hurts most")
    known = _read_kept(keep)
    exact: list[Tensor] = []
    for index, group in enumerate(by_layer):
        if all(name in known for name in group):
            step(2 * len(group) * (count - index + 1))
            continue
        exact = exact or model.boundaries(windows)
        known |= model.costs(index, group, scheme, exact, on_step=step)
        _write_kept(keep, known)
    return [
        Sensitivity(
            name=name,
            kl_nats=known[name],
            extra_bytes=stored_bytes(spec, with_int8(scheme, spec, [name])) - stored_bytes(spec, scheme),
        )
        for name in names
    ]


@torch.no_grad()
def measure_kl(
    checkpoint: Checkpoint,
    graph: Graph,
    scheme: WeightScheme,
    windows: Tensor,
    *,
    progress: Progress,
    keep: Path | None = None,
) -> float:
    """Mean KL, in nats, between the model and what rounding to nearest under ``scheme`` makes of it, on the first
    ``LEVEL_TOKENS`` of ``windows`` int64 ``[W, T]``.

    Bounded in memory as ``measure_sensitivity`` is; ``keep`` may be the same file. Raises InputError likewise.
    """
    key = f"scheme {hashlib.sha256(json.dumps(asdict(scheme), sort_keys=True).encode()).hexdigest()[:32]}"
    known = _read_kept(keep)
    if key not in known:
        model, windows = _Model(checkpoint=checkpoint, graph=graph), _first(windows, tokens=LEVEL_TOKENS)
        exact, lossy = model.embed(windows, None), model.embed(windows, scheme)
        for index in range(checkpoint.spec.num_hidden_layers):
            layer, weights = model.layer(index)
            exact = model.advance(layer, weights, exact)
            lossy = model.advance(layer, {n: _as_stored(w, n, scheme) for n, w in weights.items()}, lossy)
            progress.advance(index + 1, checkpoint.spec.num_hidden_layers)
        (known[key],) = model.mean_kl(exact, [lossy], scheme)
        _write_kept(keep, known)
    return known[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """The decoder in float32, one layer at a time. Hidden states are ``[W, T, H]``."""

    checkpoint: Checkpoint
    graph: Graph

    def embed(self, windows: Tensor, scheme: WeightScheme | None) -> Tensor:
        """What comes before the first layer, from the embedding as it is or, by rows, as ``scheme`` stores it."""
        tokens, places = windows.unique(return_inverse=True)
        return _as_stored(self.checkpoint.read(EMBEDDING)[tokens], EMBEDDING, scheme)[places]

    def layer(self, index: int) -> tuple[Layer, dict[str, Tensor]]:
        """Decoder layer ``index`` and its weights in float32."""
        layer = dissect(self.graph, index)
        names = [argument.name for node in layer.nodes for argument in node.arguments if isinstance(argument, Weight)]
        return layer, {name: self.checkpoint.read(name).float() for name in names}

    def advance(self, layer: Layer, weights: dict[str, Tensor], hidden: Tensor) -> Tensor:
        """From before ``layer`` to after it."""
        spec, table = self.checkpoint.spec, eager_table(lambda weight: weights[weight.name])
        after = []
        for chunk in hidden.split(max(1, TOKENS_AT_ONCE // hidden.shape[1])):
            after += layer.compute(
                [layer.output], table, chunk, head_dim=spec.head_dim, kv_heads=spec.num_key_value_heads
            )
        return torch.cat(after)

    def boundaries(self, windows: Tensor) -> list[Tensor]:
        """The hidden states before each layer, and after the last."""
        states = [self.embed(windows, None)]
        for index in range(self.checkpoint.spec.num_hidden_layers):
            states.append(self.advance(*self.layer(index), states[-1]))
        return states

    def costs(
        self,
        index: int,
        names: list[str],
        scheme: WeightScheme,
        exact: list[Tensor],
        *,
        on_step: Callable[[int], None],
    ) -> dict[str, float]:
        """Of each of ``names``, matrices of layer ``index``: mean KL with it alone at int4, less that at int8."""
        spec = self.checkpoint.spec
        layer, weights = self.layer(index)
        changed = []
        for name in names:
            for stored in (scheme, with_int8(scheme, spec, [name])):
                rounded = _as_stored(weights[name], name, stored)
                changed.append(self.advance(layer, {**weights, name: rounded}, exact[index]))
                on_step(1)
        for later in range(index + 1, spec.num_hidden_layers):
            layer, weights = self.layer(later)
            for variant, hidden in enumerate(changed):
                changed[variant] = self.advance(layer, weights, hidden)
            on_step(len(changed))
        kl_nats = self.mean_kl(exact[-1], changed, None)
        on_step(len(changed))
        return {name: int4 - int8 for name, int4, int8 in zip(names, kl_nats[::2], kl_nats[1::2], strict=True)}

    def mean_kl(self, exact: Tensor, changed: list[Tensor], scheme: WeightScheme | None) -> list[float]:
        """Mean KL, in nats, of what each of ``changed`` gives from what ``exact`` gives, hidden states after the last
        layer; for ``changed`` with the head as ``scheme`` stores it."""
        ending = self.graph.ending
        last = reversed([*takewhile(lambda node: node.layer is None, reversed(self.graph.nodes))])
        norm = [node for node in last if node not in ending]
        source, weight = ending[0].arguments
        assert isinstance(source, Value)  # VOCABULARY: linear is x, weight
        assert isinstance(weight, Weight)
        inputs = [self._walk(norm, hidden, source) for hidden in (exact, *changed)]
        blocks = self.checkpoint.read(weight.name).split(max(1, _LOGITS_AT_ONCE // len(inputs[0])))
        both = ((rows.float(), _as_stored(rows, weight.name, scheme)) for rows in blocks)
        means = _mean_kl(inputs[0], inputs[1:], both)
        if not all(math.isfinite(mean) for mean in means):
            raise InputError(
                "the model's logits on the text of calibration are not finite",
                hint="check the checkpoint: it may have been cut off, or have diverged in training",
            )
        return means

    def _walk(self, nodes: list[Node], hidden: Tensor, wanted: Value) -> Tensor:
        """``wanted`` at each position, ``[W * T, H]``, for ``hidden`` after the last layer."""
        values = {dissect(self.graph, self.checkpoint.spec.num_hidden_layers - 1).output: hidden}
        walk(nodes, eager_table(lambda weight: self.checkpoint.read(weight.name).float()), values)
        return values[wanted].flatten(0, 1)


def _mean_kl(exact: Tensor, changed: list[Tensor], head: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
    """Mean KL, in nats, of the logits of each of ``changed`` ``[n, H]`` from those of ``exact`` ``[n, H]``. ``head``
    gives its rows, as they are and as they are stored, in blocks: no whole row of logits is ever held.

    With z and y the logits of both, KL = E[z - y] - logsumexp(z) + logsumexp(y), where E is the mean over what z gives;
    each of the three is carried on from block to block. In float64, as ``exporter.metrics.kl_divergence`` is.
    """
    z_sum = torch.full((len(exact),), -torch.inf, dtype=torch.float64)  # logsumexp of all blocks so far
    y_sums = [z_sum.clone() for _ in changed]
    gaps = [torch.zeros_like(z_sum) for _ in changed]  # E[z - y] so far
    for rows, stored in head:
        z = F.linear(exact, rows).double()  # [n, rows]
        earlier, z_sum = z_sum, torch.logaddexp(z_sum, z.logsumexp(dim=1))
        share, rest = (z - z_sum.unsqueeze(1)).exp_(), (earlier - z_sum).exp_()
        for variant, states in enumerate(changed):
            y = F.linear(states, stored).double()
            gaps[variant].mul_(rest).add_((share * (z - y)).sum(dim=1))
            y_sums[variant] = torch.logaddexp(y_sums[variant], y.logsumexp(dim=1))
    return [(gap - z_sum + y_sum).clamp_(min=0.0).mean().item() for gap, y_sum in zip(gaps, y_sums, strict=True)]


def _first(windows: Tensor, *, tokens: int) -> Tensor:
    """Whole windows of ``windows`` that have ``tokens`` tokens between them, or the start of a longer one."""
    return windows[: max(1, tokens // windows.shape[1]), :tokens]


def _as_stored(weight: Tensor, name: str, scheme: WeightScheme | None) -> Tensor:
    """float32 of some rows of ``weight``, or of a vector, as ``scheme`` stores them, rounded to nearest; None: as they
    are. No scale is shared between rows, so that some can be rounded without the others."""
    precision = scheme.precision(name) if scheme and weight.dim() == 2 else Precision.FP32
    if scheme is None or precision is Precision.FP32:
        return weight.float()
    if precision.bits is None:
        return weight.half().float()
    group_size = scheme.groups(name, columns=weight.shape[1])
    return round_to_nearest(weight, name=name, bits=precision.bits, group_size=group_size).dequantize()


def _read_kept(file: Path | None) -> dict[str, float]:
    if file is None or not file.exists():
        return {}
    try:
        known: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}", hint="remove it and run again: it is measured anew") from error
    return known


def _write_kept(file: Path | None, known: dict[str, float]) -> None:
    if file:
        with written_whole(file) as path:
            path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
