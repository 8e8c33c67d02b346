"""Targets and backends by their labels: what ``--target`` and ``--backend`` stand for."""

from __future__ import annotations

from pathlib import Path

import pytest

import targets
from exporter.bundle import label_of
from exporter.checkpoint import BUNDLED_MODEL
from exporter.errors import UsageError
from exporter.planning import plan


@pytest.fixture(autouse=True)
def backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names as they may be, whatever is served by now."""
    named = {"executorch": ("xnnpack", "portable", "coreml", "ethos-u"), "onnxruntime": ("cpu", "coreml")}
    monkeypatch.setattr(targets, "BACKENDS", {**named, "coreml": ("gpu", "ane")})


def labels(target: str, backend: str | None = None) -> tuple[str, ...]:
    asked = {"backend": backend} if backend else {}
    return plan(BUNDLED_MODEL, out=Path("out"), target=target, **asked).targets  # type: ignore[typeddict-item]


def test_the_default_backend_goes_without_a_name() -> None:
    assert targets.label("executorch", "xnnpack") == "executorch"
    assert targets.label("executorch", "ethos-u") == "executorch-ethos-u"


@pytest.mark.parametrize("label", ["executorch", "executorch-portable", "executorch-ethos-u", "coreml-ane"])
def test_a_label_is_taken_apart_and_put_together_again(label: str) -> None:
    assert targets.label(*targets.split(label)) == label


def test_a_default_backend_may_be_told() -> None:
    assert targets.split("onnxruntime-cpu") == ("onnxruntime", "cpu")


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("tflite", "unknown target 'tflite'; known: executorch, onnxruntime, coreml, gguf, all"),
        ("coreml-tpu", "target coreml has no backend 'tpu'; known: gpu, ane"),
        ("coremlane", "unknown target 'coremlane'"),
    ],
)
def test_a_label_that_is_none_names_the_known_ones(label: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        targets.split(label)
    assert says in str(caught.value)


def test_backends_hold_for_the_targets_that_have_them() -> None:
    assert labels("executorch,coreml", "portable") == ("executorch-portable", "coreml")
    assert labels("all", "coreml") == ("executorch-coreml", "onnxruntime-coreml", "coreml")
    assert labels("executorch", "xnnpack,portable") == ("executorch", "executorch-portable")
    assert labels("executorch-portable,onnxruntime", "coreml") == ("executorch-portable", "onnxruntime-coreml")
    assert labels("executorch,executorch-xnnpack") == ("executorch",)


def test_all_are_the_compiled_targets_and_gguf_comes_by_its_name() -> None:
    assert labels("all") == ("executorch", "onnxruntime", "coreml")
    assert "gguf" in targets.NAMES


def test_a_backend_of_no_named_target_is_refused() -> None:
    with pytest.raises(UsageError, match="--backend ane is none of executorch; known: coreml, ethos-u, portable"):
        labels("executorch", "ane")


def test_a_manifest_tells_its_label() -> None:
    assert label_of({"target": "executorch", "backend": "xnnpack"}) == "executorch"
    assert label_of({"target": "coreml", "backend": "ane"}) == "coreml-ane"
    with pytest.raises(UsageError, match="has no backend 'tpu'"):
        label_of({"target": "coreml", "backend": "tpu"})
