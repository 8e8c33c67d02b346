"""The same promises, kept by every target: proven on the trained sample, and broken to see each proof fail."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import targets
from calibration.layers import ROUNDED, quantize
from calibration.rtn import encode, to_scale_grid
from exporter.bundle import (
    MANIFEST,
    Goldens,
    file_entries,
    label_of,
    open_bundle,
    read_artifact,
    write_json,
)
from exporter.checkpoint import open_checkpoint
from exporter.cli import app
from exporter.codes import digest, weight_digests
from exporter.errors import InputError
from exporter.model.graph import Constant, Graph
from exporter.model.reference import Reference
from exporter.model.trace import trace
from exporter.parity import FEW_DECODES
from exporter.prove import ask_reference, prove_codes, prove_parity
from exporter.quantized import QuantizedTensor
from exporter.spec import Artifact, Plan, Precision, Rule, Sampling, Verdict, WeightScheme
from exporter.store import StoredWeight, WeightStore
from tests.conftest import later
from tests.proving import manifest_of_proven

pytestmark = pytest.mark.toolchain
RUNNER = CliRunner()
CONTEXT = 320
VICTIM = "model.layers.1.self_attn.k_proj.weight"
INT4 = WeightScheme(body=Precision.INT4, embedding=Precision.INT8, head=Precision.INT8, group_size=32)
INT8 = dataclasses.replace(INT4, body=Precision.INT8)
FP16 = dataclasses.replace(INT4, body=Precision.FP16, embedding=Precision.FP16, head=Precision.FP16)
SCHEMES = {"coreml-ane": INT8, "onnxruntime-qnn": FP16}
"""Of backends that do not take int4 in groups; int8 on Hexagon wants a calibration text (test_onnxruntime_qnn.py)."""

AGAINST = [False, *later(True)]
"""Whether the checkpoint is there too: of what a bundle says of itself, it has to fail alone already."""

BACKENDS = [
    pytest.param(label, marks=[] if label in targets.NAMES else pytest.mark.slow)
    for label in targets.LABELS
    if targets.load(label).cannot_execute() is None
]
"""Every one that is executed here, where nothing is missing."""


@dataclasses.dataclass(frozen=True)
class Bundle:
    """One bundle of the sample, with what it was made from."""

    target: str
    folder: Path
    graph: Graph
    store: WeightStore
    plan: Plan

    def copy(self, folder: Path) -> Path:
        shutil.copytree(self.folder, folder)
        return folder


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, sample: Path) -> tuple[Path, Graph]:
    return tmp_path_factory.mktemp("contract"), trace(open_checkpoint(sample).spec)


@pytest.fixture(scope="module", params=BACKENDS)
def bundle(request: pytest.FixtureRequest, workshop: tuple[Path, Graph], sample: Path) -> Bundle:
    folder, graph = workshop
    name = request.param
    if missing := targets.load(name).missing():
        pytest.skip(missing)
    scheme = SCHEMES.get(name, INT4)
    store, _ = quantize(open_checkpoint(sample), scheme, root=folder / "store")
    words = ["-t", name, "-p", scheme.body.value, "-c", str(CONTEXT), "--json"]
    words += ["-o", str(folder / "out"), "--store", str(folder / "store")]
    words += ["--calibration", "none"] if scheme.body.bits else []
    result = RUNNER.invoke(app, words)
    assert result.exit_code == 0, result.output
    plan = plan_for(sample, name=name, scheme=store.scheme, folder=folder)
    return Bundle(target=name, folder=folder / "out" / name, graph=graph, store=store, plan=plan)


def plan_for(sample: Path, *, name: str, scheme: WeightScheme, folder: Path) -> Plan:
    return Plan(
        checkpoint=sample,
        targets=(name,),
        scheme=scheme,
        context=CONTEXT,
        recipe=ROUNDED,
        sampling=Sampling(),
        out=folder / "out",
        store=folder / "store",
        evaluation_text=sample / "evaluation.txt",
        threads=1,
    )


def validate(folder: Path, bundle: Bundle, *, against: bool) -> tuple[int, dict[str, Any]]:
    """Exit code and manifest (or nothing, where it was refused)."""
    words = ["validate", str(folder), "--store", str(bundle.plan.store), "--json"]
    result = RUNNER.invoke(app, [*words, "--against", str(bundle.plan.checkpoint)] if against else words)
    return result.exit_code, json.loads(result.stdout)[0]["manifest"] if result.stdout else {}


def account_for(folder: Path) -> None:
    """Recompute the checksums, as somebody who meant to tamper would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = file_entries(folder)
    write_json(folder / MANIFEST, manifest)


def lower_again(bundle: Bundle, folder: Path, *, graph: Graph | None = None, store: Any = None) -> Path:
    """A copy of the bundle whose artifact was lowered from another graph or store, with true checksums."""
    bundle.copy(folder)
    target = targets.load(bundle.target)
    path = target.find(folder)
    if path.is_dir():
        shutil.rmtree(path)
    target.lower(graph or bundle.graph, store or bundle.store, bundle.plan, folder)
    account_for(folder)
    return folder


class OneWeightChanged:
    """A store in which one tensor went through ``change``."""

    def __init__(self, store: WeightStore, change: Callable[[QuantizedTensor], QuantizedTensor]) -> None:
        self._store, self._change = store, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def __getitem__(self, name: str) -> StoredWeight:
        stored = self._store[name]
        if name != VICTIM:
            return stored
        assert isinstance(stored, QuantizedTensor)
        return self._change(stored)


def one_scale_up(tensor: QuantizedTensor) -> QuantizedTensor:
    """The next bf16 value for a single scale: 0.4 to 0.8 %."""
    scales = tensor.scales.clone()
    bits = scales.bfloat16().view(torch.int16)
    bits[5, -1] += 1
    return dataclasses.replace(tensor, scales=bits.view(torch.bfloat16).float())


def rounded_anew(tensor: QuantizedTensor) -> QuantizedTensor:
    """What another quantizer would have made of the same weight: plain absmax scales, at 8 bits clipped a little."""
    groups = tensor.dequantize().view(-1, tensor.group_size)
    scales = to_scale_grid(groups.abs().amax(dim=1, keepdim=True) / {4: 7, 8: 130}[tensor.bits])
    codes = encode(groups, scales, bits=tensor.bits).view(tensor.shape)
    assert not torch.equal(codes, tensor.codes)
    return dataclasses.replace(tensor, codes=codes, scales=scales.view_as(tensor.scales))


def test_the_untouched_bundle_is_proven_twice(bundle: Bundle) -> None:
    code, manifest = validate(bundle.folder, bundle, against=False)
    assert code == 0
    assert (manifest["codes"]["verdict"], manifest["parity"]["verdict"]) == ("passed", "passed")
    assert manifest["quality"]["verdict"] == "not measured"
    code, manifest = validate(bundle.folder, bundle, against=True)
    assert code == 0
    assert {manifest[kind]["verdict"] for kind in ("codes", "parity", "quality")} == {"passed"}


def test_the_manifest_tells_what_the_artifact_is(bundle: Bundle) -> None:
    manifest = json.loads((bundle.folder / MANIFEST).read_text())
    assert manifest["schema"] == "llama-export/bundle/1"
    assert manifest["precision"] == bundle.plan.scheme.body
    scheme = {"weights", "group_size", "embedding", "head", "activations", "compute_dtype", "kv_dtype"}
    assert scheme <= manifest["scheme"].keys()
    assert manifest["scheme"]["rules"] == []
    assert (manifest["context"], label_of(manifest)) == (CONTEXT, bundle.target)
    assert {"backend", "calibration", "files", "model", "source", "tools"} <= manifest.keys()
    files = {entry["path"] for entry in manifest["files"]}
    assert files >= {"tokenizer.json", "goldens.json", "chat_template.jinja", "report.html"}
    wanted = {
        "codes": {"verdict", "tensors"},
        "parity": {
            *("verdict", "runtime", "positions", "structure_max_abs_logit_diff", "mean_kl_nats", "floor_kl_nats"),
            *("worst_kl_nats", "floor_worst_kl_nats"),
            *("top1_agreement", "max_abs_logit_diff"),
        },
        "quality": {"verdict", "mean_kl_nats", "p99_kl_nats", "top1_agreement", "perplexity", "reference_perplexity"},
        "latency": {
            *("verdict", "load_s", "time_to_first_token_ms", "prefill_tokens_per_s", "decode_tokens_per_s"),
            *("threads", "runs", "host"),
        },
    }
    for kind, keys in wanted.items():
        assert keys <= manifest[kind].keys()
    assert manifest["codes"]["tensors"] == len(bundle.graph.spec.weights())
    few = targets.load(bundle.target).is_slow(bundle.graph.spec)
    assert manifest["parity"]["positions"] >= (FEW_DECODES if few else 64)
    measured = manifest["latency"]["verdict"]
    assert measured == ("not measured" if targets.load(bundle.target).latency_unmeasurable() else "passed")


def test_the_bundle_brings_a_report_of_its_proofs(bundle: Bundle) -> None:
    report = (bundle.folder / "report.html").read_text(encoding="utf-8")
    manifest = json.loads((bundle.folder / MANIFEST).read_text())
    assert "KL of the artifact from its reference by position" in report
    assert ("What quantization lost of each matrix" in report) == bool(bundle.store.scheme.body.bits)
    assert f"mean KL {manifest['parity']['mean_kl_nats']:.1e} nats" in report


IN_PLACES = ("layers.0.mlp.down_proj", "layers.1.self_attn.*", "layers.2.self_attn.[qv]_proj", "layers.3.mlp.gate_proj")
"""Matrices that are to be int8: a whole attention, and some of those that share an input with others."""


@pytest.mark.parametrize("name", targets.NAMES)
def test_a_body_of_two_precisions_is_proven_and_told_by_its_manifest(name: str, sample: Path, tmp_path: Path) -> None:
    ends, rules = Precision.INT8, tuple(Rule(pattern=pattern, precision=Precision.INT8) for pattern in IN_PLACES)
    scheme = WeightScheme(body=Precision.INT4, embedding=ends, head=ends, group_size=32, rules=rules)
    checkpoint, target = open_checkpoint(sample), targets.load(name)
    store, _ = quantize(checkpoint, scheme, root=tmp_path / "store")
    plan = plan_for(sample, name=name, scheme=scheme, folder=tmp_path)
    manifest = manifest_of_proven(target, store, plan, sample=sample)
    assert manifest["scheme"]["rules"] == [{"pattern": pattern, "precision": "int8"} for pattern in IN_PLACES]


AUDITED = [
    label
    for label, target in ((label, targets.load(label)) for label in targets.LABELS)
    if target.cannot_execute() and not target.missing()
]


@pytest.mark.slow
@pytest.mark.parametrize("label", AUDITED)
def test_what_is_only_lowered_here_is_audited_and_called_not_measured(label: str, tmp_path: Path) -> None:
    words = ["-t", label, "-p", "fp16", "-c", "64", "-o", str(tmp_path / "out"), "--json"]
    result = RUNNER.invoke(app, [*words, "--store", str(tmp_path / "store")])
    assert result.exit_code == 0, result.output
    (outcome,) = json.loads(result.stdout)
    manifest = outcome["manifest"]
    assert {manifest[kind]["verdict"] for kind in ("codes", "quality")} == {"passed"}
    if manifest["audit"]["verdict"] != "passed":  # a provider that takes few nodes
        assert manifest["audit"]["usability"] == "NO"
        assert "--target" in manifest["audit"]["reason"]
    assert {manifest[kind]["verdict"] for kind in ("parity", "latency")} == {"not measured"}
    assert manifest["parity"]["reason"] == targets.load(label).cannot_execute()
    assert manifest["parity"]["gate_mean_kl_nats"] > 0  # by which a device will be judged
    again = RUNNER.invoke(app, ["validate", outcome["folder"], "--json"])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)[0]["manifest"]["audit"] == manifest["audit"]
    refused = RUNNER.invoke(app, ["generate", outcome["folder"], "So"])
    assert refused.exit_code == 4
    assert str(targets.load(label).cannot_execute()) in refused.stderr


PREFERRED: dict[str, dict[str, Any]] = {
    "prefill": {"activations": "int8-symmetric-per-token", "head_activations": "int8-per-block", "weights": "int8"},
    "decode": {"activations": "int8-per-block", "head_activations": None, "weights": "int4", "group_size": 128},
}
"""What the manifest says of the scheme."""


@pytest.mark.parametrize("prefer", PREFERRED)
def test_a_preference_is_proven_told_by_the_manifest_and_proven_again(
    prefer: str, sample: Path, tmp_path: Path
) -> None:
    words = ["--prefer", prefer, "-t", "onnxruntime", "-c", "192", "--calibration", "none", "--threads", "1", "--json"]
    words += ["-o", str(tmp_path / "out"), "--store", str(tmp_path / "store")]
    result = RUNNER.invoke(app, words)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "out" / "onnxruntime"
    manifest = open_bundle(folder)
    assert [manifest[kind]["verdict"] for kind in ("codes", "parity", "quality", "latency")] == ["passed"] * 4
    assert manifest["prefer"] == prefer
    assert PREFERRED[prefer].items() <= manifest["scheme"].items()
    words = ["validate", str(folder), "--store", str(tmp_path / "store"), "--against", str(sample), "--json"]
    result = RUNNER.invoke(app, words)
    assert result.exit_code == 0, result.output
    again = json.loads(result.stdout)[0]["manifest"]
    for kind in ("codes", "quality"):
        assert again[kind] == manifest[kind]
    assert again["parity"]["mean_kl_nats"] == pytest.approx(manifest["parity"]["mean_kl_nats"])


def test_a_manifest_that_lacks_what_was_preferred_is_refused_in_a_sentence(bundle: Bundle) -> None:
    manifest = open_bundle(bundle.folder)
    path, scheme = targets.load(bundle.target).find(bundle.folder), manifest["scheme"]
    lacking = {key: value for key, value in manifest.items() if key != "prefer"}
    older = {key: value for key, value in scheme.items() if key != "head_activations"}
    for broken in (lacking, {**manifest, "prefer": "speed"}, {**manifest, "scheme": older}):
        with pytest.raises(InputError, match="is not as an export writes it"):
            read_artifact(broken, path=path)


def test_a_manifest_without_rules_is_read_and_one_with_broken_rules_is_refused(bundle: Bundle) -> None:
    manifest = open_bundle(bundle.folder)
    path, scheme = targets.load(bundle.target).find(bundle.folder), manifest["scheme"]
    older = {key: value for key, value in scheme.items() if key != "rules"}
    assert read_artifact({**manifest, "scheme": older}, path=path).scheme == bundle.store.scheme
    for rules in (None, ["k_proj"], [{"pattern": "k_proj"}], [{"pattern": "k_proj", "precision": "int3"}]):
        with pytest.raises(InputError, match="is not as an export writes it"):
            read_artifact({**manifest, "scheme": {**scheme, "rules": rules}}, path=path)


def test_greedy_goldens_are_what_the_artifact_says(bundle: Bundle) -> None:
    """Token by token along the reference's answer, wherever its choice is clearer than what parity saw differ."""
    manifest = open_bundle(bundle.folder)
    target = targets.load(bundle.target)
    artifact = read_artifact(manifest, path=target.find(bundle.folder))
    prompts = Goldens.read(bundle.folder).prompts
    decided = 0
    with target.open(artifact, threads=1) as runner:
        for prompt in prompts:
            runner.rewind(0)
            fed = prompt["ids"]
            for token, margin in zip(prompt["greedy_ids"], prompt["greedy_margins"], strict=True):
                best = int(runner.feed(fed)[-1].argmax())
                if margin > 2 * manifest["parity"]["max_abs_logit_diff"]:
                    assert best == token
                    decided += 1
                fed = [token]
    assert len(prompts) == 3
    assert decided >= 30


@pytest.mark.parametrize("change", [one_scale_up, rounded_anew])
@pytest.mark.parametrize("against", AGAINST)
def test_weights_that_are_not_the_stores_fail_codes(
    bundle: Bundle, change: Callable[[QuantizedTensor], QuantizedTensor], against: bool, tmp_path: Path
) -> None:
    if not bundle.store.scheme.body.bits:
        pytest.skip("it has no codes")
    tampered = lower_again(bundle, tmp_path / "bundle", store=OneWeightChanged(bundle.store, change))
    code, manifest = validate(tampered, bundle, against=against)
    assert code == 7
    assert manifest["codes"]["verdict"] == "failed"
    assert manifest["codes"]["wrong"] == [VICTIM]


class Folded:
    """A store whose attention norm of layer 1 is half the checkpoint's, and what it feeds twice: the same model."""

    def __init__(self, store: WeightStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def __getitem__(self, name: str) -> StoredWeight:
        stored = self._store[name]
        if name == "model.layers.1.input_layernorm.weight":
            return stored / 2
        if name not in {f"model.layers.1.self_attn.{kind}_proj.weight" for kind in "qkv"}:
            return stored
        return (
            dataclasses.replace(stored, scales=stored.scales * 2) if isinstance(stored, QuantizedTensor) else stored * 2
        )


def test_norms_are_the_stores_and_not_the_checkpoints(bundle: Bundle, tmp_path: Path) -> None:
    """Powers of two change no rounding: to the bit, the folded model gives what the plain one gives."""
    store, target, ids = Folded(bundle.store), targets.load(bundle.target), list(range(100, 140))
    folded = lower_again(bundle, tmp_path / "bundle", store=store)
    logits = []
    for folder in (bundle.folder, folded):
        artifact = read_artifact(open_bundle(folder), path=target.find(folder))
        with target.open(artifact, threads=1) as runner:
            logits.append(runner.feed(ids))
    assert torch.equal(*logits)
    expected = {name: digest(store[name]) for name in bundle.store}
    assert prove_codes(target, artifact, expected=expected).verdict is Verdict.PASSED
    expected = weight_digests(bundle.store)
    assert len(prove_codes(target, artifact, expected=expected).figures["wrong"]) == 4


@pytest.mark.parametrize("against", AGAINST)
def test_swapped_rope_halves_fail_parity(bundle: Bundle, against: bool, tmp_path: Path) -> None:
    """Turning by minus the angle is what exchanging the halves of each pair does."""

    def turned(argument: Any) -> Any:
        return Constant(argument.name, -argument.value) if isinstance(argument, Constant) else argument

    nodes = tuple(
        dataclasses.replace(node, arguments=tuple(map(turned, node.arguments))) for node in bundle.graph.nodes
    )
    tampered = lower_again(bundle, tmp_path / "bundle", graph=dataclasses.replace(bundle.graph, nodes=nodes))
    code, manifest = validate(tampered, bundle, against=against)
    assert code == 7
    assert (manifest["codes"]["verdict"], manifest["parity"]["verdict"]) == ("passed", "failed")


def test_a_wrong_epsilon_is_seen_by_structure(bundle: Bundle, tmp_path: Path) -> None:
    """KL hardly sees it. ExecuTorch's structure is lowered anew from the graph, so there the graph itself is wrong."""
    nodes = tuple(
        dataclasses.replace(node, arguments=(*node.arguments[:-1], 3e-4)) if node.op == "rms_norm" else node
        for node in bundle.graph.nodes
    )
    wrong = dataclasses.replace(bundle.graph, nodes=nodes)
    tampered = lower_again(bundle, tmp_path / "bundle", graph=wrong)
    target = targets.load(bundle.target)
    artifact = read_artifact(open_bundle(tampered), path=target.find(tampered))
    steps = Goldens.read(tampered).drive
    answers = ask_reference(bundle.graph, bundle.store, artifact, steps)
    report = prove_parity(target, artifact, answers, graph=wrong, store=bundle.store, plan=bundle.plan)
    assert report.verdict is Verdict.FAILED
    assert report.reason.startswith("structure")


@pytest.mark.parametrize(
    "change",
    [
        {"files": None},
        {"files": [{}]},
        {"target": "tflite"},
        {"scheme": {}},
        {"model": {"name": "x"}},
        {"context": None},
    ],
)
def test_a_manifest_that_no_export_wrote_is_refused_in_a_sentence(
    bundle: Bundle, change: dict[str, Any], tmp_path: Path
) -> None:
    tampered = bundle.copy(tmp_path / "bundle")
    manifest = json.loads((tampered / MANIFEST).read_text())
    write_json(tampered / MANIFEST, {**manifest, **change})
    result = RUNNER.invoke(app, ["validate", str(tampered)])
    assert result.exit_code in (2, 3)
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ")


@pytest.mark.parametrize("against", AGAINST)
def test_a_dropped_cache_write_fails_parity(bundle: Bundle, against: bool, tmp_path: Path) -> None:
    if bundle.target not in ("onnxruntime", *DROPS):
        pytest.skip("it has a test of its own beside its backend")
    with pytest.MonkeyPatch.context() as patch:
        if bundle.target == "onnxruntime":
            tampered = bundle.copy(tmp_path / "bundle")
            drop_write_onnx(tampered / "model.onnx")
            account_for(tampered)
        else:
            DROPS[bundle.target](patch)
            tampered = lower_again(bundle, tmp_path / "bundle")
    code, manifest = validate(tampered, bundle, against=against)
    assert code == 7
    assert (manifest["codes"]["verdict"], manifest["parity"]["verdict"]) == ("passed", "failed")


def drop_write_onnx(path: Path) -> None:
    """Layer 1 gives back the key cache it was given, and writes its own into a buffer that nobody reads."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    attention = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"][1]
    attention.output[1] = "lost"
    model.graph.node.append(onnx.helper.make_node("Identity", ["past_key_values.1.key"], ["present.1.key"]))
    onnx.save(model, path)


def drop_write_executorch(patch: pytest.MonkeyPatch) -> None:
    from targets.executorch import outer

    def forward(self: Any, q: Any, k: Any, v: Any, start: Any) -> Any:
        keys, values = self.get_buffer("keys"), self.get_buffer("values")
        torch.ops.llama.update_cache(v, values, start)  # and none for the keys
        return torch.ops.llama.custom_sdpa(q, keys, values, start, None, 0.0, True, self.scale)

    patch.setattr(outer.Attention, "forward", forward)


def drop_write_coreml(patch: pytest.MonkeyPatch) -> None:
    from targets.coreml import emission

    original = emission.State.update
    calls = 0

    def update(self: Any, new: Any, *, begin: Any, end: Any) -> None:
        nonlocal calls
        calls += 1
        if calls != 3:  # the keys of layer 1
            original(self, new, begin=begin, end=end)

    patch.setattr(emission.State, "update", update)


DROPS = {"executorch": drop_write_executorch, "coreml": drop_write_coreml}


def test_a_flipped_byte_is_refused_by_its_checksum(bundle: Bundle, tmp_path: Path) -> None:
    tampered = bundle.copy(tmp_path / "bundle")
    largest = max((path for path in tampered.rglob("model*/**/*") if path.is_file()), default=None)
    file = largest or max(tampered.glob("model.*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert validate(tampered, bundle, against=False)[0] == 3
    assert validate(tampered, bundle, against=True)[0] == 3


def test_a_missing_and_a_stray_file_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    tampered = bundle.copy(tmp_path / "bundle")
    (tampered / "stray.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"holds stray.bin, which its manifest does not list"):
        open_bundle(tampered)
    (tampered / "stray.bin").unlink()
    (tampered / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"lacks tokenizer.json"):
        open_bundle(tampered)


def test_what_this_host_measures_is_a_device_report_unless_something_stood_in(bundle: Bundle, tmp_path: Path) -> None:
    copied, file = bundle.copy(tmp_path / "bundle"), tmp_path / "device-report.json"
    words = ["validate", str(copied), "--threads", "1", "--json"]
    here = RUNNER.invoke(app, [*words, "--device-report-file", str(file)])
    if reason := targets.load(bundle.target).latency_unmeasurable():
        assert (here.exit_code, file.exists()) == (2, False)
        assert f"--device-report-file: {reason}" in here.stderr
        return
    assert here.exit_code == 0, here.output
    (measured,) = json.loads(here.stdout)
    folded = RUNNER.invoke(app, ["validate", str(copied), "--device-report", str(file)])
    assert folded.exit_code == 0, folded.output
    (device,) = open_bundle(copied)["devices"]
    for kind, names in (("parity", ("positions", "mean_kl_nats")), ("latency", ("load_s", "decode_tokens_per_s"))):
        assert [device[kind][name] for name in names] == [measured["manifest"][kind][name] for name in names]
    assert device["parity"]["runtime"].startswith(measured["manifest"]["parity"]["runtime"])
    assert (device["greedy"], device["chats"], device["peak_memory_bytes"]) == (None, None, None)


@pytest.mark.parametrize("bundle", ["coreml"], indirect=True)
def test_core_ml_is_proven_on_the_compute_units_that_were_chosen(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a Mac, but for ``MLModel``: in its place stands the evaluator, behind the same calls."""
    from targets.coreml import runner as module
    from targets.coreml.evaluate import Evaluator, Rounding

    chosen: list[str] = []

    class Model:
        def __init__(self, path: str, *, compute_units: Any) -> None:
            chosen.append(compute_units.name)
            self._evaluate = Evaluator(Path(path), rounding=Rounding.FP16)

        def make_state(self) -> object:
            return self

        def predict(self, inputs: dict[str, Any], *, state: object) -> dict[str, Any]:
            ids, mask = (torch.from_numpy(inputs[name]) for name in ("inputIds", "causalMask"))
            return {"logits": self._evaluate({"inputIds": ids, "causalMask": mask.float()})["logits"].numpy()}

    stand_in = SimpleNamespace(models=SimpleNamespace(MLModel=Model), ComputeUnit=module.ct.ComputeUnit)
    monkeypatch.setattr("targets.coreml.executes_here", lambda: True)
    monkeypatch.setattr(module, "ct", stand_in)
    copied = bundle.copy(tmp_path / "bundle")
    for units in ("CPU_AND_NE", "ALL"):
        file = tmp_path / f"{units}.json"
        words = ["validate", str(copied), "--compute-units", units, "--device-report-file", str(file), "--json"]
        here = RUNNER.invoke(app, words)
        assert here.exit_code == 0, here.output
        assert set(chosen) == {units}
        assert RUNNER.invoke(app, ["validate", str(copied), "--device-report", str(file)]).exit_code == 0
        chosen.clear()
    told = [device["device"]["runtime"].split(",")[0] for device in open_bundle(copied)["devices"]]
    assert told == ["Core ML on ALL", "Core ML on CPU_AND_NE"]  # each is kept


@pytest.mark.parametrize(("option", "value"), [("--compute-units", "ALL"), ("--device-report-file", "here.json")])
def test_a_device_report_is_not_taken_and_made_at_once(bundle: Bundle, option: str, value: str) -> None:
    result = RUNNER.invoke(app, ["validate", str(bundle.folder), "--device-report", "theirs.json", option, value])
    assert result.exit_code == 2
    assert f"leave {option} out" in result.stderr


def test_another_checkpoint_is_not_what_it_was_made_from(bundle: Bundle, sample: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(sample, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    result = RUNNER.invoke(app, ["validate", str(bundle.folder), "--against", str(other)])
    assert result.exit_code == 3
    assert "was made from a checkpoint with sha256" in result.stderr


def test_the_same_export_twice_has_byte_identical_weights(bundle: Bundle, tmp_path: Path) -> None:
    again = lower_again(bundle, tmp_path / "bundle")
    before, after = (
        {entry["path"]: entry["sha256"] for entry in file_entries(folder)} for folder in (bundle.folder, again)
    )
    assert before == after


def test_feeding_up_to_the_last_position_rewinding_and_beyond(bundle: Bundle) -> None:
    manifest = open_bundle(bundle.folder)
    target = targets.load(bundle.target)
    artifact: Artifact = read_artifact(manifest, path=target.find(bundle.folder))
    ids = torch.randint(2000, (CONTEXT,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = Reference(bundle.graph, bundle.store, artifact.arithmetic).feed(ids)
    with target.open(artifact, threads=1) as runner:
        whole = runner.feed(ids)[-1]
        assert (whole - expected[-1]).abs().max() < 0.2
        with pytest.raises(InputError, match=f"1 tokens at position {CONTEXT} do not fit a context of {CONTEXT}"):
            runner.feed([1])
        runner.rewind(CONTEXT - 7)
        assert runner.position == CONTEXT - 7
        assert (runner.feed(ids[-7:])[-1] - expected[-1]).abs().max() < 0.2
        with pytest.raises(InputError, match="cannot rewind"):
            runner.rewind(CONTEXT + 1)
        runner.rewind(0)
        with pytest.raises(InputError, match="do not fit"):
            runner.feed([*ids, 1])
        assert (runner.feed(ids[:5])[-1] - expected[4]).abs().max() < 0.2
