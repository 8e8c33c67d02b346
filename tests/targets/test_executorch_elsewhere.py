"""ExecuTorch's backends that this host does not run: what lowers is audited, and the audit sees what is wrong."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import targets
from exporter.checkpoint.config import read_spec
from exporter.codes import weight_digests
from exporter.errors import HostError
from exporter.model.reference import FULL_PRECISION
from exporter.prove import prove_codes
from exporter.spec import PER_ROW, Logits, Precision, Verdict
from targets import load
from targets.executorch.delegations import DELEGATIONS, PROBES
from targets.executorch.metadata import describe
from tests.targets.test_executorch import CONTEXT, Lowered, scheme_of, tokens, write_checkpoint

LOWERED = {
    "coreml": ("fp32", "fp16", "int8", "int4"),
    "vulkan": ("fp32", "fp16", "int8", "int4"),
    "mps": ("fp32",),
    "arm": ("fp32",),
}
"""What is lowered in these tests, a toy of two layers each."""

needs_tosa = pytest.mark.skipif(
    importlib.util.find_spec("tosa_serializer") is None, reason="tosa-tools is not installed"
)
CASES = [
    pytest.param(backend, precision, marks=needs_tosa if backend == "arm" else ())
    for backend, precisions in LOWERED.items()
    for precision in precisions
]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Lowered]:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("toy") / "model")
    made: dict[tuple[str, str], Lowered] = {}

    def lowered(backend: str, precision: str) -> Lowered:
        if (backend, precision) not in made:
            ends = "int8" if precision == "int4" else precision
            scheme = scheme_of(precision, embedding=ends, head=ends)
            out, target = tmp_path_factory.mktemp("lowered"), load(f"executorch-{backend}")
            made[backend, precision] = Lowered(checkpoint, scheme, Logits.LAST, context=CONTEXT, out=out, target=target)
        return made[backend, precision]

    return lowered


# --- lowered and audited -----------------------------------------------------------------------------------------


@pytest.mark.toolchain
@pytest.mark.slow
@pytest.mark.parametrize(("backend", "precision"), CASES)
def test_a_lowered_program_holds_the_stores_codes_and_passes_its_audit(
    toy: Callable[[str, str], Lowered], backend: str, precision: str
) -> None:
    lowered, target = toy(backend, precision), load(f"executorch-{backend}")
    report = target.audit(lowered.artifact)
    assert report is not None
    assert (report.verdict, report.reason) == (Verdict.PASSED, ""), report
    assert report.figures["delegates"].keys() == {DELEGATIONS[backend].delegate}
    codes = prove_codes(target, lowered.artifact, expected=weight_digests(lowered.store))
    assert codes.verdict is Verdict.PASSED, codes


@pytest.mark.toolchain
@pytest.mark.slow
@pytest.mark.parametrize("precision", LOWERED["coreml"])
def test_core_ml_keeps_keys_and_values_in_the_dtype_that_is_claimed(
    toy: Callable[[str, str], Lowered], precision: str
) -> None:
    from targets.coreml.package import MilType, Package
    from targets.executorch.audit import Anatomy
    from targets.executorch.read import ProgramFile

    artifact = toy("coreml", precision).artifact
    with ProgramFile(artifact.path) as file, closing(Anatomy(file, artifact, DELEGATIONS["coreml"])) as anatomy:
        (payload,) = anatomy.payloads
        assert payload.folder is not None
        package = Package(Path(payload.folder.name, "lowered_module", "model.mlpackage"))
    states = [given.type.stateType for given in package.inputs if given.type.WhichOneof("type") == "stateType"]
    assert len(states) == 2 * artifact.spec.num_hidden_layers
    claimed = {"fp16": MilType.FLOAT16, "fp32": MilType.FLOAT32}[artifact.arithmetic.kv_dtype]
    assert {state.wrappedType.tensorType.dataType for state in states} == {claimed}


@pytest.mark.toolchain
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["vulkan", "mps"])
def test_a_program_that_no_partitioner_took_fails_its_audit(
    toy: Callable[[str, str], Lowered], backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from targets.executorch import delegated

    lowered, target = toy(backend, "fp32"), load(f"executorch-{backend}")
    recipe = replace(delegated.RECIPES[backend], partitioners=list)
    monkeypatch.setitem(delegated.RECIPES, backend, recipe)
    report = target.audit(target.lower(lowered.graph, lowered.store, lowered.plan, tmp_path))
    assert report is not None
    assert report.verdict is Verdict.FAILED
    assert f"the program has 0 delegates of {DELEGATIONS[backend].delegate}, between 1 and" in report.reason
    assert "left over" in report.reason


@pytest.mark.toolchain
@pytest.mark.slow
def test_a_mask_that_is_not_finite_fails_the_audit(
    toy: Callable[[str, str], Lowered], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from targets.executorch import plain

    monkeypatch.setattr(plain, "MASKED", float("-inf"))
    lowered, target = toy("coreml", "fp16"), load("executorch-coreml")
    report = target.audit(target.lower(lowered.graph, lowered.store, lowered.plan, tmp_path))
    assert report is not None
    assert (report.verdict, report.reason) == (Verdict.FAILED, "a constant is not finite")


@pytest.mark.toolchain
@pytest.mark.slow
def test_a_delegate_with_outputs_that_its_call_does_not_have_fails_the_audit(
    toy: Callable[[str, str], Lowered], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention that does not change its cache in place: Vulkan's partitioner makes a constant of it, in silence."""
    from targets.executorch import delegated, plain

    recipe = delegated.RECIPES["vulkan"]
    form = replace(recipe.form(torch.float32), attention=plain.FiniteAttention)
    monkeypatch.setitem(delegated.RECIPES, "vulkan", replace(recipe, form=lambda _dtype: form))
    lowered, target = toy("vulkan", "fp32"), load("executorch-vulkan")
    report = target.audit(target.lower(lowered.graph, lowered.store, lowered.plan, tmp_path))
    assert report is not None
    assert report.verdict is Verdict.FAILED
    assert "a delegate has 7 inputs and outputs, its call 3" in report.reason


@pytest.mark.toolchain
def test_a_number_that_is_not_finite_shows_in_a_payload() -> None:
    from targets.executorch.payloads import Held, Payload

    def holding(value: float) -> Held:
        return Held(shape=(2,), read=lambda: torch.tensor([1.0, value]))

    assert Payload(held=[holding(2.0)], numbers=[1e30]).is_finite()
    assert not Payload(held=[holding(float("-inf"))]).is_finite()
    assert not Payload(held=[holding(float("nan"))]).is_finite()
    assert not Payload(numbers=[float("inf")]).is_finite()


@pytest.mark.toolchain
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["vulkan", "coreml", "mps", pytest.param("arm", marks=needs_tosa)])
def test_a_weight_that_is_gone_fails_the_audit(
    toy: Callable[[str, str], Lowered], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from targets.executorch import payloads

    read = payloads._READERS[backend]

    def without_one(*arguments: Any) -> Any:
        payload = read(*arguments)
        linears = [use for use in payload.uses if use.op == "linear"]
        payload.uses.remove(linears[3])
        return payload

    monkeypatch.setitem(payloads._READERS, backend, without_one)
    report = load(f"executorch-{backend}").audit(toy(backend, "fp32").artifact)
    assert report is not None
    assert report.verdict is Verdict.FAILED
    assert "20 ops with weights, the model 21" in report.reason


@pytest.mark.toolchain
@pytest.mark.slow
def test_a_weight_in_another_precision_than_was_asked_for_fails_the_audit(toy: Callable[[str, str], Lowered]) -> None:
    artifact = toy("vulkan", "fp32").artifact
    asked = replace(artifact, scheme=replace(artifact.scheme, body=Precision.INT4))
    report = load("executorch-vulkan").audit(asked)
    assert report is not None
    assert "model.layers.0.self_attn.q_proj.weight is stored as fp32, int4 was asked for" in report.reason


@pytest.mark.toolchain
@pytest.mark.slow
def test_one_changed_bit_of_a_weight_in_a_delegate_shows(toy: Callable[[str, str], Lowered], tmp_path: Path) -> None:
    lowered = toy("vulkan", "fp32")
    name = "model.layers.1.mlp.down_proj.weight"
    contents = bytearray(lowered.artifact.path.read_bytes())
    stored = lowered.store[name].numpy()  # type: ignore[union-attr]
    where = max(contents.find(stored.tobytes()), contents.find(stored.T.copy().tobytes()))
    assert where > 0
    contents[where] ^= 1
    damaged = replace(lowered.artifact, path=tmp_path / "damaged.pte")
    damaged.path.write_bytes(contents)
    report = prove_codes(load("executorch-vulkan"), damaged, expected=weight_digests(lowered.store))
    assert report.figures["wrong"] == [name]


@pytest.mark.toolchain
@pytest.mark.parametrize("form", ["FusedAttention", "FiniteAttention", "CustomAttention"])
def test_single_steps_of_each_attention_equal_the_reference(form: str, tmp_path: Path) -> None:
    """In eager torch: no runtime here executes the delegates."""
    from targets.executorch import plain
    from targets.executorch.delegated import FloatLinear
    from targets.executorch.outer import embedding_module

    scheme = scheme_of("fp32")
    checkpoint = write_checkpoint(tmp_path / "model")
    lowered = Lowered(checkpoint, scheme, Logits.ALL, context=CONTEXT, out=tmp_path / "portable", target=NotLowering())
    attention = getattr(plain, form)
    made = plain.Form(embedding=embedding_module, linear=FloatLinear, attention=attention)  # type: ignore[arg-type]
    decoder = plain.Decoder(lowered.graph, lowered.store, form=made, context=CONTEXT, logits=Logits.LAST)
    ids = tokens(20)
    expected = lowered.reference(FULL_PRECISION).feed(ids)
    with torch.no_grad():
        rows = [decoder(torch.tensor([[token]]), torch.tensor([at]))[0, 0] for at, token in enumerate(ids)]
    assert (torch.stack(rows) - expected).abs().max() < 1e-5


class NotLowering:
    """Stands in for a target where only what it would be given is wanted."""

    def lower(self, *_: object) -> None:
        return None


# --- what this host is told --------------------------------------------------------------------------------------


def test_a_program_of_single_tokens_says_so_to_its_runner(tmp_path: Path) -> None:
    spec = read_spec(write_checkpoint(tmp_path / "model"))
    described = describe(spec, context=48, longest=1)
    assert (described["get_max_seq_len"], described["get_max_context_len"]) == (1, 48)
    assert (described["enable_dynamic_shape"], described["use_sdpa_with_kv_cache"]) == (False, False)
    assert describe(spec, context=48, longest=16)["enable_dynamic_shape"] is True


def test_every_backend_of_executorch_is_served_under_its_name() -> None:
    served = [load(targets.label("executorch", backend)) for backend in targets.BACKENDS["executorch"]]
    assert [target.backend for target in served] == [*targets.BACKENDS["executorch"]]
    assert {target.name for target in served} == {"executorch"}


@pytest.mark.parametrize("backend", PROBES)
def test_a_probe_names_what_is_lacking_and_then_that_the_lowering_is_not_written(
    backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target = load(f"executorch-{backend}")
    monkeypatch.delenv("QNN_SDK_ROOT", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert "which is not on this host; it is provided by " in (target.missing() or "")
    monkeypatch.setenv("QNN_SDK_ROOT", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    monkeypatch.setattr("shutil.which", lambda _: "here")
    assert "is not written" in (target.missing() or "")


def test_what_a_probe_lacks_comes_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QNN_SDK_ROOT", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    told = {backend: load(f"executorch-{backend}").missing() or "" for backend in PROBES}
    assert told["openvino"].endswith('pip install "executorch[openvino]==1.4.1" nncf')
    assert told["ethos-u"].endswith('pip install "executorch[ethos-u]==1.4.1"')
    assert told["vgf"].endswith('pip install "executorch[vgf]==1.4.1"')
    assert told["qnn"].endswith("export QNN_SDK_ROOT=<its folder>")
    assert told["mediatek"].endswith("pip install mtk_converter-*.whl")
    assert (load("executorch-arm").missing() or "").endswith("pip install --no-deps tosa-tools==2026.5.0")


def test_no_toolchain_is_imported_to_say_what_is_missing() -> None:
    """QNN's would download an SDK."""
    script = (
        "import sys, targets\n"
        "for backend in targets.BACKENDS['executorch']: targets.load(f'executorch-{backend}').missing()\n"
        "print({'executorch', 'torch', 'coremltools', 'openvino'} & set(sys.modules))"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "set()"


@pytest.mark.parametrize("backend", [*DELEGATIONS, *PROBES])
def test_what_cannot_run_here_says_why_and_opens_nothing(backend: str) -> None:
    target = load(f"executorch-{backend}")
    reason = target.cannot_execute() or ""
    assert reason.startswith("ExecuTorch's wheel has no runtime for ")
    assert target.latency_unmeasurable() == reason
    with pytest.raises(HostError, match="no runtime for"):
        target.open(None, threads=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("backend", "scheme", "says"),
    [
        ("mps", scheme_of("int8"), "takes fp32, fp16 matrices, and model.embed_tokens.weight is to be int8"),
        ("arm", scheme_of("int4"), "takes fp32, fp16 matrices, and model.embed_tokens.weight is to be int4"),
        ("vulkan", scheme_of("int4", group_size=PER_ROW), None),
        ("coreml", scheme_of("int4", group_size=64), "has 96 columns, which int4 groups of 64 do not divide"),
        ("coreml", scheme_of("int4"), None),
    ],
)
def test_precisions_that_a_backend_does_not_take_are_refused(
    backend: str, scheme: Any, says: str | None, tmp_path: Path, make_plan: Callable[..., Any]
) -> None:
    folder = write_checkpoint(tmp_path / "model")
    plan = replace(make_plan(folder), scheme=scheme)
    reason = load(f"executorch-{backend}").refuse(read_spec(folder), plan)
    assert reason is None if says is None else says in (reason or "")
