"""Codes that a checkpoint has: the scheme under which they stay as they are, and what cannot be asked for beside it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.checkpoint import LazyCodes, LazyTensor, read_codes
from exporter.errors import InputError, UsageError
from exporter.spec import EMBEDDING, HEAD, CodeKind, KeptCodes, ModelSpec, Plan, Precision, Rule, WeightScheme
from targets.keepers import cannot_keep

_OURS = (
    *("precision", "group_size", "rule", "budget_mb", "max_kl", "calibration", "calibration_column", "method"),
    *("windows", "window_length", "seed", "act_order", "damping"),
)
"""Choices that say how codes are to be made, and so cannot be asked for where they are there."""
_NO_CHANGE = {"calibration": "none", "prefer": "quality"}
_REQUANTIZE = "add --requantize, which decodes them and chooses all anew"
_GROUP_SIZE = 32
"""Of a head that is to be int4."""


def kept_scheme(checkpoint: Path, choices: Mapping[str, Any], spec: ModelSpec) -> WeightScheme | None:
    """The scheme that keeps a checkpoint's codes: what has none is stored as float16, what has codes of a kind that no
    target knows as int8 by row, and the head as asked for.

    None where there are no codes, where most weights of the body have none that can be kept, and where ``choices`` say
    ``requantize``. Reads headers alone. Raises InputError for codes that cannot be kept.
    """
    if choices.get("requantize"):
        if not any(isinstance(tensor, LazyCodes) for tensor in read_codes(checkpoint, spec).values()):
            raise UsageError(f"{checkpoint} has no codes, --requantize changes nothing", hint="leave it out")
        return None
    tensors = read_codes(checkpoint, spec)
    matrices = {name: tensors.get(name) for name in _matrices(spec)}
    kinds = {name: tensor.kind for name, tensor in matrices.items() if isinstance(tensor, LazyCodes)}
    kept = {name: kind for name, kind in kinds.items() if kind}
    if not _is_most_of_body(kept, spec):
        return None
    asked = _head(choices.get("head"))
    changed = {HEAD, spec.stored_name(HEAD)} if asked else set()
    kept = {name: kind for name, kind in kept.items() if name not in changed}
    _refuse_unkeepable(tensors, kept)
    return _scheme(spec, kept, decoded=kinds.keys() - kept.keys(), head=asked)


def _scheme(
    spec: ModelSpec, kept: Mapping[str, CodeKind], *, decoded: set[str], head: Precision | None
) -> WeightScheme:
    def rest(name: str) -> Precision:
        return Precision.INT8 if name in decoded else Precision.FP16

    end = spec.stored_name(HEAD)
    chosen = head or (kept[end].precision if end in kept else rest(end))
    embedding = kept[EMBEDDING].precision if EMBEDDING in kept else rest(EMBEDDING)
    body = [name for name in _matrices(spec) if name not in (EMBEDDING, HEAD)]
    sizes: Counter[Precision] = Counter()
    for name in body:
        if name in kept:
            sizes[kept[name].precision] += math.prod(spec.weights()[name])
    groups: dict[CodeKind, list[str]] = {}
    for name, kind in kept.items():
        groups.setdefault(kind, []).append(name)
    return WeightScheme(
        body=sizes.most_common(1)[0][0],
        embedding=chosen if end == EMBEDDING else embedding,
        head=chosen,
        group_size=_GROUP_SIZE,
        rules=_rules({name: rest(name) for name in body if name not in kept}),
        kept=tuple(KeptCodes(kind=kind, names=tuple(names)) for kind, names in groups.items()),
    )


def _rules(rest: Mapping[str, Precision]) -> tuple[Rule, ...]:
    """Of matrices of the body that are not kept: the most frequent precision for all, the others by name."""
    if not rest:
        return ()
    ((usual, _),) = Counter(rest.values()).most_common(1)
    others = (name for name, precision in rest.items() if precision is not usual)
    named = [Rule(pattern=name.removeprefix("model.").removesuffix(".weight"), precision=rest[name]) for name in others]
    return (Rule(pattern="*", precision=usual), *named)


def _matrices(spec: ModelSpec) -> list[str]:
    return [name for name, shape in spec.weights().items() if len(shape) == 2]


def _is_most_of_body(kept: Mapping[str, CodeKind], spec: ModelSpec) -> bool:
    """Of a GGUF file of another type only what has no whole block of it is Q8_0, or Q5_0."""
    sizes = {name: math.prod(spec.weights()[name]) for name in _matrices(spec) if name not in (EMBEDDING, HEAD)}
    return 2 * sum(size for name, size in sizes.items() if name in kept) > sum(sizes.values())


def _head(asked: str | None) -> Precision | None:
    known = (Precision.INT8, Precision.INT4)
    if asked is not None and asked not in known:
        raise UsageError(f"--head {asked} is unknown; known: {', '.join(known)}", hint="choose one with --head")
    return Precision(asked) if asked else None


def can_keep(scheme: WeightScheme, labels: Sequence[str]) -> bool:
    """Whether codes are to be kept for these targets. Of a GGUF file they are so where all of them can: it is decoded
    for one that cannot, as any file of another type is. Codes of a checkpoint that is nothing but codes are kept, or
    refused by name (``targets.refusal``)."""
    foreign = all(codes.kind.source == "gguf" for codes in scheme.kept)
    return not foreign or not any(cannot_keep(label, codes.kind) for label in labels for codes in scheme.kept)


def why_decoded(tensors: Mapping[str, LazyTensor], plan: Plan) -> str | None:
    """Why codes that could be kept for other targets are chosen anew in a plan that did not ask for it; None where it
    is not so."""
    if plan.scheme.kept or plan.requantize:
        return None
    kinds = {tensor.kind for tensor in tensors.values() if isinstance(tensor, LazyCodes)} - {None}
    found = {why: label for label in plan.targets for kind in kinds if kind and (why := cannot_keep(label, kind))}
    return next((f"codes are decoded and chosen anew, for {label}: {why}" for why, label in found.items()), None)


def refuse_changes(checkpoint: Path, scheme: WeightScheme, choices: Mapping[str, Any], *, adapter: Path | None) -> None:
    """Raises UsageError for choices that would change codes that are kept, telling how to have either."""
    told = "; ".join(f"{codes.kind.source}, {codes.kind}" for codes in scheme.kept)
    asked = [name for name in (*_OURS, "prefer") if choices.get(name) not in (None, [], _NO_CHANGE.get(name))]
    if asked or adapter:
        option = f"--{asked[0].replace('_', '-')}" if asked else "--adapter"
        raise UsageError(
            f"{checkpoint} has codes already ({told}), which stay as they are: {option} would change them",
            hint=f"leave {option} out to keep them, or {_REQUANTIZE}",
        )


def _refuse_unkeepable(tensors: Mapping[str, LazyTensor], kept: Mapping[str, CodeKind]) -> None:
    for name in kept:
        tensor = tensors[name]
        assert isinstance(tensor, LazyCodes)  # that is how it was chosen
        if tensor.refusal:
            raise InputError(f"{name} has codes that cannot be kept: {tensor.refusal}", hint=_REQUANTIZE)
