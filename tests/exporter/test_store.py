"""The WeightStore: whole parts only, found again, resumed where it stopped, the same bytes every time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from calibration import layers
from calibration.layers import quantize
from exporter.checkpoint import open_checkpoint
from exporter.errors import InputError
from exporter.quantized import QuantizedTensor
from exporter.spec import HEAD, Precision, WeightScheme
from tests.conftest import Toy

INT4 = WeightScheme(body=Precision.INT4, embedding=Precision.INT8, head=Precision.INT8, group_size=32)
INT8 = WeightScheme(body=Precision.INT8, embedding=Precision.INT8, head=Precision.INT8, group_size=32)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the one that says how long it took."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "timings.json"}


def test_every_tensor_of_the_model_is_answered_for(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_toy(tie_word_embeddings=False).folder)
    store, _ = quantize(checkpoint, INT4, root=tmp_path / "store")
    for name, shape in checkpoint.spec.weights().items():
        stored = store[name]
        assert tuple(stored.shape) == shape
        if len(shape) == 1:
            assert torch.equal(stored, checkpoint.read(name).float())
        else:
            assert isinstance(stored, QuantizedTensor)
            ends = name in (HEAD, "model.embed_tokens.weight")
            assert (stored.bits, stored.group_size) == ((8, shape[1]) if ends else (4, 32))


def test_floats_are_read_through_from_the_checkpoint(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_toy().folder)
    for precision, dtype in ((Precision.FP32, torch.float32), (Precision.FP16, torch.float16)):
        scheme = WeightScheme(body=precision, embedding=precision, head=precision, group_size=32)
        store, made = quantize(checkpoint, scheme, root=tmp_path / "store")
        name = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(store[name], checkpoint.read(name).to(dtype))
        assert made == 0
        assert not store.folder.exists()


def test_two_runs_give_the_same_bytes(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_toy().folder)
    one, _ = quantize(checkpoint, INT4, root=tmp_path / "one")
    two, _ = quantize(checkpoint, INT4, root=tmp_path / "two")
    assert contents(one.folder) == contents(two.folder)


def test_a_second_run_finds_everything_and_another_scheme_nothing(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_toy().folder)
    assert quantize(checkpoint, INT4, root=tmp_path)[1] == 3  # two layers and the ends
    assert quantize(checkpoint, INT4, root=tmp_path)[1] == 0
    assert quantize(checkpoint, INT8, root=tmp_path)[1] == 3


def test_a_changed_weight_is_another_store(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    first, second = (open_checkpoint(make_toy(seed=seed).folder) for seed in (0, 1))
    assert quantize(first, INT4, root=tmp_path)[0].folder != quantize(second, INT4, root=tmp_path)[0].folder


def test_a_run_that_was_stopped_resumes_at_the_first_missing_part(
    make_toy: Callable[..., Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(make_toy().folder)
    whole, _ = quantize(checkpoint, INT4, root=tmp_path / "whole")
    original, calls = layers.round_to_nearest, 0

    def interrupted(*arguments: object, **named: object) -> QuantizedTensor:
        nonlocal calls
        calls += 1
        if calls == 10:  # in the middle of the second layer
            raise KeyboardInterrupt
        return original(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(layers, "round_to_nearest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(checkpoint, INT4, root=tmp_path / "cut")
    monkeypatch.setattr(layers, "round_to_nearest", original)
    resumed, made = quantize(checkpoint, INT4, root=tmp_path / "cut")
    assert made == 2
    assert contents(resumed.folder) == contents(whole.folder)


def test_a_killed_process_leaves_whole_parts_only(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    toy = make_toy(num_hidden_layers=40, hidden_size=128, intermediate_size=512)
    code = (
        "import sys; from pathlib import Path\n"
        "from calibration.layers import quantize; from exporter.checkpoint import open_checkpoint\n"
        "from tests.exporter.test_store import INT4\n"
        "quantize(open_checkpoint(Path(sys.argv[1])), INT4, root=Path(sys.argv[2]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(toy.folder), str(tmp_path / "killed")])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list((tmp_path / "killed").glob("*/layer-*"))) < 3:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    checkpoint = open_checkpoint(toy.folder)
    resumed, made = quantize(checkpoint, INT4, root=tmp_path / "killed")
    whole, parts = quantize(checkpoint, INT4, root=tmp_path / "whole")
    assert 0 < made < parts
    resumed_files = {name: data for name, data in contents(resumed.folder).items() if not name.startswith(".")}
    assert resumed_files == contents(whole.folder)


def test_errors_of_each_tensor_lie_beside_its_codes(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_toy().folder)
    store, _ = quantize(checkpoint, INT4, root=tmp_path)
    errors = store.read_errors()
    name = "model.layers.1.mlp.down_proj.weight"
    weight, stored = checkpoint.read(name).float(), store[name]
    assert isinstance(stored, QuantizedTensor)
    expected = (weight - stored.dequantize()).square().sum() / weight.square().sum()
    assert errors[name].stored == pytest.approx(expected.item(), rel=1e-5)
    assert errors[name].rounded == errors[name].stored
    assert 0.001 < errors[name].stored < 0.02  # int4 in groups of 32 of Gaussian weights
    summary = json.loads((store.folder / "store.json").read_text())
    assert summary["errors"] == {name: asdict(error) for name, error in errors.items()}
    assert summary["scheme"]["body"] == "int4"
    assert summary["source_sha256"] == checkpoint.sha256


def test_weights_that_are_not_finite_are_refused(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    toy = make_toy()
    with torch.no_grad():
        toy.model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    toy.model.save_pretrained(toy.folder)
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj.weight holds values that are not finite"):
        quantize(open_checkpoint(toy.folder), INT4, root=tmp_path)


def test_a_weight_beyond_float16_is_refused_with_its_value(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    toy = make_toy()
    with torch.no_grad():
        toy.model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    toy.model.save_pretrained(toy.folder)
    half = WeightScheme(body=Precision.FP16, embedding=Precision.FP16, head=Precision.FP16, group_size=32)
    store, _ = quantize(open_checkpoint(toy.folder), half, root=tmp_path)
    with pytest.raises(InputError, match=r"holds 1e\+05, float16 ends at 65504"):
        store["model.layers.0.mlp.up_proj.weight"]


def test_a_broken_store_file_says_what_to_remove(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_toy().folder)
    store, _ = quantize(checkpoint, INT4, root=tmp_path)
    file = store.part_file(0)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read"):
        store["model.layers.0.mlp.up_proj.weight"]
