"""Every reader on damaged files: cut off, bits flipped, fields that are nonsense. What is read then is a whole model,
or an InputError tells what is wrong; nothing else is raised, and nothing hangs."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter.checkpoint import BUNDLED_MODEL, LazyCodes, open_checkpoint
from exporter.errors import InputError
from exporter.tokenizer import open_tokenizer
from tests import formats
from tests.coded import FORMATS, write_meta_coded
from tests.conftest import Toy, write_toy
from tests.exporter.test_adapter import factors, shapes_of, write_adapter
from tests.exporter.test_checkpoint import pickled
from tests.exporter.test_gguf import Kind, write_gguf
from tests.exporter.test_gguf_tokenizer import llama3_fields
from tests.exporter.test_meta import in_lines, train_sentencepiece, write_meta
from tests.formats import toy_for
from tests.generations import toy_config

MODULE = "model.layers.0.self_attn.q_proj"
PROMPT = timedelta(seconds=20)
"""What no file of some hundred kilobytes takes to be read, or refused, on a busy machine."""


def read_all(path: Path, *, adapter: Path | None = None) -> None:
    """Every tensor has the shape that the model wants, decoded and as the codes that it is."""
    checkpoint = open_checkpoint(path, adapter=adapter, images=True)
    for name, shape in checkpoint.spec.weights().items():
        assert tuple(checkpoint.read(name).shape) == shape
        tensor = checkpoint.tensors[name]
        if isinstance(tensor, LazyCodes) and tensor.kind and not tensor.refusal:
            assert tensor.coded().shape == shape


def read_tokenizer(path: Path) -> None:
    tokenizer = open_tokenizer(path, cache=path.parent / "cache")
    assert isinstance(tokenizer.decode(tokenizer.encode("The year 1984, naïve 👍")), str)


def safetensors(toy: Toy) -> Path:
    return toy.folder


def sharded(toy: Toy) -> Path:
    folder = toy.folder.with_name("sharded")
    write_toy(folder, shards=3)
    return folder


def pickles(toy: Toy) -> Path:
    pickled(toy, shards=2)
    return toy.folder


def metas(toy: Toy) -> Path:
    return write_meta(toy, toy.folder.with_name("meta"), shards=2)


def gguf_file(toy: Toy) -> Path:
    fields = {"tokenizer.ggml.tokens": [str(index) for index in range(96)], "tokenizer.ggml.token_type": [1] * 96}
    extra = {"rope_freqs.weight": np.ones(16, dtype=np.float32)}
    file = toy.folder.with_name("gguf") / "sound.gguf"
    file.parent.mkdir()
    return write_gguf(file, toy, kind=Kind.Q8_0, fields=fields, extra=extra)


def coded_as(form: str) -> Callable[[Toy], Path]:
    def write(toy: Toy) -> Path:
        folder = toy.folder.with_name("coded")
        FORMATS[form].write(folder, toy.folder)
        return folder

    return write


def qlora(toy: Toy) -> Path:
    folder = toy.folder.with_name("qlora")
    write_meta_coded(folder, toy.folder, rank=4)
    return folder


def other(generation: str) -> Callable[[Toy], Path]:
    def write(toy: Toy) -> Path:
        return write_toy(toy.folder.with_name("other"), **toy_config(generation)).folder

    return write


def experts_as(form: str) -> Callable[[Toy], Path]:
    def write(toy: Toy) -> Path:
        config = toy_for(form, toy_config("Llama 4 Scout"))
        return formats.FORMATS[form](write_toy(toy.folder.with_name("experts") / "toy", **config)).path

    return write


scout, vision = other("Llama 4 Scout"), other("Llama 3.2 Vision")


WEIGHTS: dict[str, tuple[Callable[[Toy], Path], tuple[str, ...]]] = {
    "safetensors": (safetensors, ("model.safetensors",)),
    "shards": (sharded, ("model.safetensors.index.json", "model-00002-of-00003.safetensors")),
    "pickles": (pickles, ("pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin")),
    "meta": (metas, ("consolidated.01.pth",)),
    "gguf": (gguf_file, ("sound.gguf",)),
    "gptq": (coded_as("gptq with zero points"), ("model.safetensors",)),
    "awq": (coded_as("awq"), ("model.safetensors",)),
    "compressed-tensors": (coded_as("packed with zero points"), ("model.safetensors",)),
    "qlora": (qlora, ("consolidated.00.pth",)),
    "experts": (scout, ("model.safetensors",)),
    "images": (vision, ("model.safetensors",)),
    "experts in meta's layout": (experts_as("Meta"), ("consolidated.01.pth",)),
    "experts in gguf": (experts_as("GGUF Q8_0"), ("toy-Q8_0.gguf",)),
}
"""How a toy is written, and the files that are damaged, one at a time."""

DAMAGE = {
    "kept": st.floats(0, 1) | st.just(1.0),
    "flips": st.lists(st.tuples(st.integers(0, 1 << 31), st.integers(0, 7)), max_size=4),
    "in_header": st.booleans(),
}


def damaged(content: bytes, *, kept: float, flips: list[tuple[int, int]], in_header: bool) -> bytes:
    bits = bytearray(content)
    for place, bit in flips:
        bits[place % min(2500 if in_header else sys.maxsize, len(bits))] ^= 1 << bit
    return bytes(bits[: round(kept * len(bits))])


def put(file: Path, content: bytes) -> None:
    file.unlink(missing_ok=True)  # an earlier one may still be mapped
    file.write_bytes(content)


@pytest.mark.parametrize(("kind", "file"), [(kind, file) for kind, (_, files) in WEIGHTS.items() for file in files])
def test_damaged_weights_are_read_right_or_refused(kind: str, file: str, tmp_path: Path) -> None:
    path = WEIGHTS[kind][0](write_toy(tmp_path / "toy"))
    victim = path if path.is_file() else path / file
    sound = victim.read_bytes()
    read_all(path)

    @settings(deadline=PROMPT, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
    @given(**DAMAGE)
    def check(**damage: Any) -> None:
        put(victim, damaged(sound, **damage))
        with suppress(InputError):
            read_all(path)

    check()


def tokenizer_json(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BUNDLED_MODEL / name, folder / name)
    return folder


def sentencepiece(folder: Path) -> Path:
    (folder / "params.json").write_text("{}")
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(vocab_size=700))
    return folder


def tiktoken(folder: Path) -> Path:
    (folder / "params.json").write_text("{}")
    letters = {bytes([byte]): byte for byte in range(256)}
    pairs = {pair.encode(): 256 + rank for rank, pair in enumerate(["th", "he", "in", "the", " a", "19", "84"])}
    (folder / "tokenizer.model").write_bytes(in_lines(letters | pairs))
    return folder


def gguf_vocabulary(folder: Path) -> Path:
    return write_gguf(folder / "sound.gguf", write_toy(folder / "toy"), fields=llama3_fields())


TOKENIZERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "tokenizer.json": (tokenizer_json, "tokenizer.json"),
    "tokenizer_config.json": (tokenizer_json, "tokenizer_config.json"),
    "sentencepiece": (sentencepiece, "tokenizer.model"),
    "tiktoken": (tiktoken, "tokenizer.model"),
    "gguf": (gguf_vocabulary, "sound.gguf"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_damaged_tokenizers_are_read_right_or_refused(kind: str, tmp_path: Path) -> None:
    write, file = TOKENIZERS[kind]
    (tmp_path / "model").mkdir()
    path = write(tmp_path / "model")
    victim = path if path.is_file() else path / file
    sound = victim.read_bytes()
    read_tokenizer(path)

    @settings(deadline=PROMPT, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
    @given(**DAMAGE)
    def check(**damage: Any) -> None:
        put(victim, damaged(sound, **damage))
        with suppress(InputError):
            read_tokenizer(path)

    check()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.sampled_from([0, 1, 3, 4, 64, 1 << 20, 1 << 40])
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)

DESCRIPTIONS: dict[str, tuple[Callable[[Toy], Path], str]] = {
    "config.json": (safetensors, "config.json"),
    "generation_config.json": (safetensors, "generation_config.json"),
    "safetensors index": (sharded, "model.safetensors.index.json"),
    "params.json": (metas, "params.json"),
    "config.json of gptq": (coded_as("gptq"), "config.json"),
    "config.json of compressed-tensors": (coded_as("packed"), "config.json"),
    "params.json of qlora": (qlora, "params.json"),
    "config.json of experts": (scout, "config.json"),
    "config.json of images": (vision, "config.json"),
    "params.json of experts": (experts_as("Meta"), "params.json"),
    "adapter_config.json": (safetensors, "../adapter/adapter_config.json"),
}


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_nonsense_in_a_description_is_refused_or_without_effect(kind: str, tmp_path: Path) -> None:
    """Any value in any field, at the top or one level below."""
    write, file = DESCRIPTIONS[kind]
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {**llama3, "original_max_position_embeddings": 32, "rope_theta": 5e5}
    toy = write_toy(tmp_path / "toy", rope_parameters=rope)
    path = write(toy)
    adapter = write_adapter(tmp_path / "adapter", factors(shapes_of(toy, MODULE)), target_modules=["q_proj"])
    sound = json.loads((path / file).read_text())
    places = [(field,) for field in sound]
    places += [(field, inner) for field, value in sound.items() if isinstance(value, dict) for inner in value]

    @settings(deadline=PROMPT, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
    @given(place=st.sampled_from(places), value=VALUES)
    def check(place: tuple[str, ...], value: Any) -> None:
        content = json.loads(json.dumps(sound))
        (content if len(place) == 1 else content[place[0]])[place[-1]] = value
        (path / file).write_text(json.dumps(content))
        with suppress(InputError):
            read_all(path, adapter=adapter if "adapter" in kind else None)

    check()


def test_a_damaged_adapter_is_read_right_or_refused(tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "toy")
    adapter = write_adapter(tmp_path / "adapter", factors(shapes_of(toy, MODULE)), target_modules=["q_proj"])
    victim = adapter / "adapter_model.safetensors"
    sound = victim.read_bytes()

    @settings(deadline=PROMPT, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
    @given(**DAMAGE)
    def check(**damage: Any) -> None:
        put(victim, damaged(sound, **damage))
        with suppress(InputError):
            read_all(toy.folder, adapter=adapter)

    check()
