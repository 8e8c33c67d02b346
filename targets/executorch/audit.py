"""What the file shows of a program that this host cannot run: who computes what, and with which constants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing

from exporter.errors import LoweringError
from exporter.quantized import QuantizedTensor
from exporter.spec import Artifact, Report, Verdict
from exporter.store import PlainWeight, StoredWeight, plain
from targets.executorch import border
from targets.executorch.delegations import Delegation

with border.toolchain("be imported"):
    from executorch.exir.schema import DelegateCall, KernelCall

    from targets.executorch.payloads import Payload, read_payload
    from targets.executorch.read import ProgramFile
    from targets.executorch.uses import KernelUses, Use, named

_PLAIN = frozenset({"executorch_prim::et_view", "aten::copy_"})
"""Kernels that compute nothing: a view, and the way back of what a delegate made of a cache."""


class Anatomy:
    """One program taken apart, open until it is closed. Raises LoweringError where a delegate cannot be read."""

    def __init__(self, file: ProgramFile, artifact: Artifact, delegation: Delegation) -> None:
        self.left_over: Counter[str] = Counter()
        self.delegates: Counter[str] = Counter()
        self.payloads: list[Payload] = []
        self.delegate_bytes = 0
        self.misfits: list[str] = []
        self.uses: list[Use] = []
        plan, kernels = file.forward, KernelUses(file, artifact)
        for call in (i.instr_args for chain in plan.chains for i in chain.instructions):
            if isinstance(call, DelegateCall):
                delegate = plan.delegates[call.delegate_index]
                self.delegates[delegate.id] += 1
                if delegate.id == delegation.delegate:
                    data = file.payload(delegate)
                    self.delegate_bytes += len(data)
                    payload = read_payload(data, backend=delegation.backend, file=file, artifact=artifact)
                    self.payloads.append(payload)
                    if payload.arguments != len(call.args):
                        self.misfits.append(
                            f"a delegate has {payload.arguments} inputs and outputs, its call {len(call.args)}"
                        )
                    self.uses += payload.uses
            elif isinstance(call, KernelCall):
                name = plan.operators[call.op_index].name
                if name not in _PLAIN:
                    self.left_over[name] += 1
                self.uses += kernels.of(call)
        self.is_finite = all(payload.is_finite() for payload in self.payloads) and file.is_finite()

    def close(self) -> None:
        for payload in self.payloads:
            if payload.folder:
                payload.folder.cleanup()


def read_weights(artifact: Artifact, delegation: Delegation) -> Iterator[tuple[str, StoredWeight]]:
    """Every weight under its name, from delegates and from the program around them. Raises LoweringError."""
    with ProgramFile(artifact.path) as file, closing(Anatomy(file, artifact, delegation)) as anatomy:
        yield from named(artifact, anatomy.uses)


def audit(artifact: Artifact, delegation: Delegation) -> Report:
    """Passed where the delegates are as many as expected and hold the model's ops and weights in the precision asked
    for, nothing but known kernels is left outside, and every number is finite."""
    with ProgramFile(artifact.path) as file, closing(Anatomy(file, artifact, delegation)) as anatomy:
        faults = list(_faults(anatomy, artifact, delegation))
        figures = {
            "delegates": dict(anatomy.delegates),
            "delegate_bytes": anatomy.delegate_bytes,
            "delegated_ops": dict(Counter(op for payload in anatomy.payloads for op in payload.ops)),
            "left_over": dict(anatomy.left_over),
        }
    return Report(verdict=Verdict.FAILED if faults else Verdict.PASSED, reason="; ".join(faults), figures=figures)


def _faults(anatomy: Anatomy, artifact: Artifact, delegation: Delegation) -> Iterator[str]:
    once, each = delegation.delegates
    most = once + each * artifact.spec.num_hidden_layers
    count = anatomy.delegates[delegation.delegate]
    if not 1 <= count <= most:
        yield f"the program has {count} delegates of {delegation.delegate}, between 1 and {most} were expected"
    if strange := sorted(anatomy.delegates.keys() - {delegation.delegate}):
        yield f"it has delegates of {', '.join(strange)} too"
    if left := sorted(anatomy.left_over.keys() - delegation.left_over):
        told = ", ".join(f"{anatomy.left_over[name]} x {name}" for name in left)
        yield f"{delegation.title} left over {told}"
    yield from anatomy.misfits
    if not anatomy.is_finite:
        yield "a constant is not finite"
    try:
        for name, weight in named(artifact, anatomy.uses):
            wanted, found = artifact.scheme.precision(name), _precision(plain(weight))
            if len(weight.shape) == 2 and found != wanted:
                yield f"{name} is stored as {found}, {wanted} was asked for"
    except LoweringError as error:
        yield str(error)


def _precision(weight: PlainWeight) -> str:
    if isinstance(weight, QuantizedTensor):
        return f"int{weight.bits}"
    return {2: "fp16", 4: "fp32"}.get(weight.dtype.itemsize, str(weight.dtype))
