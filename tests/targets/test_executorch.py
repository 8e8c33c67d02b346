"""The ExecuTorch target against the reference, against the stock lowering, and against the store."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from calibration.layers import ROUNDED, quantize
from exporter.checkpoint import BUNDLED_MODEL, open_checkpoint
from exporter.checkpoint.config import read_spec
from exporter.errors import CapacityError, InputError, LoweringError, MissingToolError
from exporter.metrics import kl_divergence
from exporter.model.graph import Graph, Node, Value, Weight
from exporter.model.reference import FULL_PRECISION, Reference, round_activations
from exporter.model.rope import inverse_frequencies, rope_table
from exporter.model.trace import trace
from exporter.quantized import QuantizedTensor
from exporter.spec import (
    EMBEDDING,
    HEAD,
    PER_ROW,
    Activations,
    Arithmetic,
    Artifact,
    Logits,
    ModelSpec,
    Plan,
    Precision,
    Rule,
    Sampling,
    WeightScheme,
)
from exporter.store import StoredWeight, WeightStore
from targets import load
from targets.base import Target
from targets.executorch import border
from targets.executorch.runner import ProgramRunner
from tests.conftest import clear_tokens

TARGET = load("executorch")

CONTEXT = 48
CUTS = (17, 9, 1, 1, 5, 1, 1)
"""Lengths of successive calls: prefill, prefill on a cache that is not empty, decode; on both sides of 8 and of 16."""

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}


class Lowered:
    """A lowered model with all that it was made from."""

    def __init__(
        self,
        checkpoint: Path,
        scheme: WeightScheme,
        logits: Logits,
        *,
        context: int,
        out: Path,
        target: Target = TARGET,
    ) -> None:
        opened = open_checkpoint(checkpoint)
        self.store, _ = quantize(opened, scheme, root=out / "store")
        self.graph = trace(opened.spec)
        self.plan = Plan(
            checkpoint=checkpoint,
            targets=("executorch",),
            scheme=scheme,
            context=context,
            logits=logits,
            recipe=ROUNDED,
            sampling=Sampling(),
            out=out,
            store=out / "store",
            evaluation_text=out / "unused.txt",
            threads=1,
        )
        self.artifact = target.lower(self.graph, self.store, self.plan, out)

    def reference(self, arithmetic: Arithmetic | None = None, *, noise: float = 0.0) -> Reference:
        return Reference(self.graph, self.store, arithmetic or self.artifact.arithmetic, noise=noise)


def write_checkpoint(folder: Path, *, tied: bool = True, layers: int = 2) -> Path:
    """A toy Llama with random weights, in Hugging Face layout."""
    folder.mkdir()
    config = {**CONFIG, "tie_word_embeddings": tied, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(7)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.1 + (1.0 if len(shape) == 1 else 0.0)
        for name, shape in read_spec(folder).weights().items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def scheme_of(
    body: str, *, embedding: str = "", head: str = "", group_size: int = 32, rules: dict[str, str] | None = None
) -> WeightScheme:
    ends = [Precision(precision or body) for precision in (embedding, head)]
    return WeightScheme(
        body=Precision(body),
        embedding=ends[0],
        head=ends[1],
        group_size=group_size,
        rules=tuple(Rule(pattern=name, precision=Precision(rule)) for name, rule in (rules or {}).items()),
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("toy") / "model")


UNLIKE_TWINS = ("layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.1.self_attn.[kv]_proj")
"""Projections that are to differ in precision from others with the same input."""

SCHEMES = {
    "int4 per row": scheme_of("int4", group_size=PER_ROW),
    "int4, int8 in places": scheme_of("int4", rules=dict.fromkeys(UNLIKE_TWINS, "int8")),
    "int8, int4 in places": scheme_of("int8", rules=dict.fromkeys(UNLIKE_TWINS, "int4")),
    "int4 per row, int8 in places": scheme_of("int4", group_size=PER_ROW, rules=dict.fromkeys(UNLIKE_TWINS, "int8")),
}


@pytest.fixture(scope="module")
def toy(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Lowered]:
    """The toy model in one precision throughout, or under one of ``SCHEMES``, with the logits of every position;
    lowered once."""
    made: dict[str, Lowered] = {}

    def lowered(name: str) -> Lowered:
        if name not in made:
            scheme = SCHEMES[name] if name in SCHEMES else scheme_of(name)
            out = tmp_path_factory.mktemp("lowered")
            made[name] = Lowered(checkpoint, scheme, Logits.ALL, context=CONTEXT, out=out)
        return made[name]

    return lowered


def tokens(count: int, *, vocab_size: int = 160) -> list[int]:
    ids: list[int] = torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(3)).tolist()
    return ids


def feed_in_cuts(runner: Any, ids: list[int], cuts: tuple[int, ...]) -> Tensor:
    pieces = torch.tensor(ids).split(list(cuts))
    return torch.cat([runner.feed(piece.tolist()) for piece in pieces])


def same(stored: StoredWeight, read: StoredWeight) -> bool:
    if isinstance(stored, Tensor):
        return isinstance(read, Tensor) and stored.dtype == read.dtype and torch.equal(stored, read)
    return (
        isinstance(read, QuantizedTensor)
        and (stored.bits, stored.group_size) == (read.bits, read.group_size)
        and torch.equal(stored.codes, read.codes)
        and torch.equal(stored.scales, read.scales)
    )


# --- structure and numbers ---------------------------------------------------------------------------------------


@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("scheme", "bound"), [("fp32", 1e-4), ("fp16", 1e-3), ("int4", 1e-4), *((name, 1e-4) for name in SCHEMES)]
)
def test_structure_equals_the_reference(
    toy: Callable[[str], Lowered], tmp_path: Path, scheme: str, bound: float
) -> None:
    lowered = toy(scheme)
    ids = tokens(sum(CUTS))
    expected = lowered.reference(FULL_PRECISION).feed(ids)
    with TARGET.open_structure(
        lowered.artifact, graph=lowered.graph, store=lowered.store, plan=lowered.plan, scratch=tmp_path
    ) as runner:
        assert (feed_in_cuts(runner, ids, CUTS) - expected).abs().max() <= bound


@pytest.mark.toolchain
@pytest.mark.parametrize(("bits", "group_size"), [(8, 64), (4, 32), (4, 64)])
def test_activations_are_rounded_as_the_reference_rounds_them(tmp_path: Path, bits: int, group_size: int) -> None:
    """A head that is the identity shows the rounded rows of the embedding; the rows include ties and zeros."""
    width = 64
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(12, width, generator=generator)
    halves = torch.randint(-255, 256, (12, width), generator=generator) / 2
    rows = torch.cat([normal, normal * 1e-6, normal * 1e6, normal.abs() + 5, -normal.abs(), halves, normal * 0])
    identity = QuantizedTensor(
        name=HEAD,
        bits=bits,
        group_size=group_size,
        codes=torch.eye(width, dtype=torch.int8),
        scales=torch.ones(width, width // group_size),
    )
    artifact = lower_embedding_and_head(rows, identity, path=tmp_path / "linear.pte")
    with TARGET.open(artifact, threads=1) as runner:
        rounded = runner.feed(range(len(rows)))
    assert torch.equal(
        rounded, round_activations(rows, artifact.arithmetic.activations, group_size=identity.group_size)
    )
    assert not torch.equal(rounded, rows)


def lower_embedding_and_head(rows: Tensor, head: QuantizedTensor, *, path: Path) -> Artifact:
    from targets.executorch.lower import write_program

    vocab_size, width = rows.shape
    spec = replace(
        read_spec(write_checkpoint(path.with_suffix(".model"), tied=False)), vocab_size=vocab_size, hidden_size=width
    )
    embedding = Node(
        op="embedding", name="rows", arguments=(Value("ids"), Weight(EMBEDDING, (vocab_size, width))), layer=None
    )
    linear = Node(op="linear", name="head", arguments=(Value("rows"), Weight(HEAD, head.shape)), layer=None)
    graph = Graph(spec=spec, inputs=("ids",), nodes=(embedding, linear), outputs={"logits": Value("head")})
    context = len(rows)
    write_program(graph, {EMBEDDING: rows, HEAD: head}, path, context=context, logits=Logits.ALL)
    scheme = scheme_of("int8", embedding="fp32")
    return Artifact(
        target="executorch",
        backend="xnnpack",
        path=path,
        spec=spec,
        scheme=scheme,
        arithmetic=TARGET.arithmetic(scheme),
        context=context,
        logits=Logits.ALL,
    )


@pytest.mark.toolchain
@pytest.mark.parametrize(
    "scheme",
    [
        scheme_of("int8"),
        scheme_of("int4", embedding="int8", head="int8"),
        scheme_of("int4", group_size=PER_ROW),
        scheme_of("int4", embedding="int8", head="int8", rules=dict.fromkeys(UNLIKE_TWINS, "int8")),
    ],
    ids=["int8", "int4", "int4 per row throughout", "int4, int8 in places"],
)
def test_the_trained_sample_is_within_ten_times_its_noise_floor(tmp_path: Path, scheme: WeightScheme) -> None:
    lowered = Lowered(BUNDLED_MODEL, scheme, Logits.ALL, context=128, out=tmp_path)
    tokenizer = Tokenizer.from_file(str(BUNDLED_MODEL / "tokenizer.json"))
    ids = tokenizer.encode((BUNDLED_MODEL / "evaluation.txt").read_text(encoding="utf-8")).ids[:128]
    expected = lowered.reference().feed(ids)
    floor = kl_divergence(expected, lowered.reference(noise=1e-6).feed(ids)).mean()
    with TARGET.open(lowered.artifact, threads=1) as runner:
        logits = feed_in_cuts(runner, ids, (90, 17, *[1] * 21))
    assert kl_divergence(expected, logits).mean() <= 10 * floor
    unrounded = lowered.reference(FULL_PRECISION).feed(ids)
    assert kl_divergence(expected, logits).mean() < kl_divergence(unrounded, logits).mean() / 2


@pytest.mark.toolchain
def test_the_last_position_alone_has_the_logits_that_all_positions_give_it(
    toy: Callable[[str], Lowered], checkpoint: Path, tmp_path: Path
) -> None:
    every = toy("fp32")
    last = Lowered(checkpoint, scheme_of("fp32"), Logits.LAST, context=CONTEXT, out=tmp_path)
    ids = tokens(20)
    with TARGET.open(every.artifact, threads=1) as all_runner, TARGET.open(last.artifact, threads=1) as last_runner:
        for piece in (ids[:11], ids[11:19], ids[19:]):
            expected, found = all_runner.feed(piece), last_runner.feed(piece)
            assert found.shape == (1, 160)
            assert (found[0] - expected[-1]).abs().max() < 1e-5


@pytest.mark.toolchain
def test_a_rounded_input_is_given_to_codes_of_one_type_only() -> None:
    """XNNPACK may lay it out as suits one of those that take it; on this host it may also round anew for each."""
    from targets.executorch.xnnpack import Segment, Wire, xnn

    segment, x = Segment(), Wire((1, CONTEXT, 64))
    kinds = {"q": (4, 32), "k": (8, 64), "v": (4, 64), "q2": (4, 32), "k2": (8, 64), "v2": (4, 64)}
    for name, (bits, group_size) in kinds.items():
        scales = torch.ones(8, 64 // group_size)
        codes = torch.zeros(8, 64, dtype=torch.int8)
        weight = QuantizedTensor(name=name, bits=bits, group_size=group_size, codes=codes, scales=scales)
        segment.linear(x, name=name, weight=weight)
    values = [
        value.xvalue_union.tensor_value for value in segment._values if hasattr(value.xvalue_union, "quant_params")
    ]
    datatypes = {value.id_out: value.datatype for value in values}
    nodes = [node.xnode_union for node in segment._nodes]
    linears = [node for node in nodes if isinstance(node, xnn.XNNFullyConnected)]
    fed = {(node.input1_id, datatypes[node.filter_id]) for node in linears}
    assert len(linears) == 6
    assert len({source for source, _ in fed}) == len({datatype for _, datatype in fed}) == len(fed) == 3
    assert sum(isinstance(node, xnn.XNNConvert) for node in nodes) == 3


@pytest.mark.toolchain
@pytest.mark.slow
def test_emitted_and_stock_lowering_give_the_same_bits(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", layers=1)
    scheme = scheme_of("int4", embedding="int8", head="int8")
    lowered = Lowered(folder, scheme, Logits.ALL, context=CONTEXT, out=tmp_path / "out")
    stock = replace(lowered.artifact, path=tmp_path / "stock.pte")
    stock.path.write_bytes(stock_program(lowered.graph.spec, lowered.store))
    ids = tokens(sum(CUTS))
    with TARGET.open(lowered.artifact, threads=1) as ours, TARGET.open(stock, threads=1) as theirs:
        assert torch.equal(feed_in_cuts(ours, ids, CUTS), feed_in_cuts(theirs, ids, CUTS))


def stock_program(spec: ModelSpec, store: WeightStore) -> bytes:
    """The same layer written as a torch module and lowered by ExecuTorch's partitioner: an independent oracle.

    The mean in the norm is a linear here too: as ``mean`` it would stay outside of XNNPACK and sum in another order.
    """
    with border.toolchain("lower the oracle"):
        import executorch.extension.llm.custom_ops.custom_ops
        import executorch.kernels.quantized  # noqa: F401
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        length = torch.export.Dim("length", max=CONTEXT - 1)
        examples = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        exported = torch.export.export(
            StockLayer(spec, store), examples, dynamic_shapes=({1: length}, None), strict=False
        ).run_decompositions({})
        config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
        edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()], compile_config=config)
        program: bytes = edge.to_executorch().buffer
    return program


class StockLayer(torch.nn.Module):
    """A decoder of one layer in plain torch, with torchao's quantized tensors as weights."""

    def __init__(self, spec: ModelSpec, store: WeightStore) -> None:
        super().__init__()
        self.spec = spec
        embedding = store[EMBEDDING]
        assert isinstance(embedding, QuantizedTensor)
        self.codes = torch.nn.Buffer(embedding.codes)
        self.scales = torch.nn.Buffer(embedding.scales)
        short = {name.removesuffix(".weight").rpartition(".")[2]: name for name in spec.weights()}
        self.weights = torch.nn.ParameterDict({key: stock_weight(store[name]) for key, name in short.items()})
        self.mean = torch.nn.Buffer(torch.full((1, spec.hidden_size), 1 / spec.hidden_size))
        inv_freq = inverse_frequencies(spec.rope, head_dim=spec.head_dim)
        cos, sin = rope_table(inv_freq, first=0, count=CONTEXT)
        self.cos = torch.nn.Buffer(torch.cat([cos, cos], dim=-1)[:, None])
        self.sin = torch.nn.Buffer(torch.cat([-sin, sin], dim=-1)[:, None])
        self.keys = torch.nn.Buffer(torch.zeros(1, CONTEXT, spec.num_key_value_heads, spec.head_dim))
        self.values = torch.nn.Buffer(torch.zeros(1, CONTEXT, spec.num_key_value_heads, spec.head_dim))

    def forward(self, ids: Tensor, input_pos: Tensor) -> Tensor:
        start, length = input_pos[0].item(), ids.shape[1]
        torch._check(start >= 0)
        torch._check(start + length <= CONTEXT)
        x = torch.ops.quantized_decomposed.embedding_byte(self.codes, self.scales, None, -128, 127, ids)
        normal = self.norm(x, "input_layernorm")
        q, k, v = (self.linear(normal, f"{name}_proj").unflatten(2, (-1, self.spec.head_dim)) for name in "qkv")
        cos, sin = self.cos.narrow(0, start, length), self.sin.narrow(0, start, length)
        q, k = (y * cos + torch.cat(y.chunk(2, dim=-1)[::-1], dim=-1) * sin for y in (q, k))
        torch.ops.llama.update_cache(k, self.keys, start)
        torch.ops.llama.update_cache(v, self.values, start)
        scale = self.spec.head_dim**-0.5
        context = torch.ops.llama.custom_sdpa(q, self.keys, self.values, start, None, 0.0, True, scale)
        x = x + self.linear(context.flatten(2), "o_proj")
        normal = self.norm(x, "post_attention_layernorm")
        gate = torch.nn.functional.silu(self.linear(normal, "gate_proj"))
        x = x + self.linear(gate * self.linear(normal, "up_proj"), "down_proj")
        return self.linear(self.norm(x, "norm"), "embed_tokens")

    def linear(self, x: Tensor, name: str) -> Tensor:
        return torch.nn.functional.linear(x, self.weights[name])

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean = torch.nn.functional.linear(x * x, self.mean)
        return x * torch.rsqrt(mean + self.spec.rms_norm_eps) * self.weights[name]


def stock_weight(stored: StoredWeight) -> torch.nn.Parameter:
    from torchao.quantization import IntxUnpackedToInt8Tensor
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
        IntxUnpackedToInt8TensorActivationQuantization,
    )

    if isinstance(stored, Tensor):
        return torch.nn.Parameter(stored, requires_grad=False)
    tensor = IntxUnpackedToInt8Tensor(
        stored.codes,
        stored.scales,
        torch.zeros_like(stored.scales, dtype=torch.int8),
        torch.int8 if stored.bits == 8 else torch.int4,
        (1, stored.group_size),
        torch.float32,
        IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN,
    )
    return torch.nn.Parameter(tensor, requires_grad=False)


# --- the file ----------------------------------------------------------------------------------------------------


@pytest.mark.toolchain
@pytest.mark.parametrize("scheme", ["fp32", "fp16", "int4", *SCHEMES])
def test_weights_read_back_equal_the_store_bit_for_bit(toy: Callable[[str], Lowered], scheme: str) -> None:
    lowered = toy(scheme)
    read = list(TARGET.read_weights(lowered.artifact))
    assert all(same(lowered.store[name], weight) for name, weight in read)
    assert sorted(name for name, _ in read) == sorted([*lowered.graph.spec.weights(), EMBEDDING])  # tied: two copies


@pytest.mark.toolchain
def test_embedding_body_and_head_may_differ_in_precision(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tied=False, layers=1)
    scheme = scheme_of("int8", embedding="int4", head="fp16")
    lowered = Lowered(folder, scheme, Logits.LAST, context=CONTEXT, out=tmp_path / "out")
    read = dict(TARGET.read_weights(lowered.artifact))
    assert read.keys() == lowered.graph.spec.weights().keys()
    assert all(same(lowered.store[name], weight) for name, weight in read.items())
    ids = tokens(CONTEXT)
    with TARGET.open(lowered.artifact, threads=2) as runner:
        assert kl_divergence(lowered.reference().feed(ids)[-1:], runner.feed(ids)).mean() < 1e-3


@pytest.mark.toolchain
def test_one_changed_bit_of_a_scale_in_the_file_shows(toy: Callable[[str], Lowered], tmp_path: Path) -> None:
    lowered = toy("int4")
    name = "model.layers.1.mlp.down_proj.weight"
    stored = lowered.store[name]
    assert isinstance(stored, QuantizedTensor)
    scales = stored.scales.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    contents = bytearray(lowered.artifact.path.read_bytes())
    assert contents.count(scales) == 1
    contents[contents.find(scales)] ^= 1
    damaged = replace(lowered.artifact, path=tmp_path / "damaged.pte")
    damaged.path.write_bytes(contents)
    differing = [read for read, weight in TARGET.read_weights(damaged) if not same(lowered.store[read], weight)]
    assert differing == [name]


@pytest.mark.toolchain
def test_the_same_inputs_give_the_same_bytes(toy: Callable[[str], Lowered], tmp_path: Path) -> None:
    lowered = toy("int4")
    again = TARGET.lower(lowered.graph, lowered.store, lowered.plan, tmp_path)
    assert again.path.read_bytes() == lowered.artifact.path.read_bytes()
    assert list(tmp_path.iterdir()) == [again.path]


@pytest.mark.toolchain
def test_no_weight_of_a_program_outlives_its_writing(toy: Callable[[str], Lowered], tmp_path: Path) -> None:
    lowered = toy("int4")
    before = delegates_with_weights()  # the test that lowers with ExecuTorch's own partitioner leaves some
    TARGET.lower(lowered.graph, lowered.store, lowered.plan, tmp_path)
    assert delegates_with_weights() <= before


def delegates_with_weights() -> set[int]:
    """The identity of each one alive."""
    from executorch.exir._serialize._named_data_store import NamedDataStoreOutput

    gc.collect()
    return {id(one) for one in gc.get_objects() if type(one) is NamedDataStoreOutput and one.buffers}


@pytest.mark.toolchain
def test_the_program_describes_the_model_to_a_runner(toy: Callable[[str], Lowered]) -> None:
    script = """
import sys, warnings
warnings.simplefilter("ignore")
from executorch.extension.pybindings import _portable_lib
program = _portable_lib._load_program(sys.argv[1])
for index in range(program.num_methods()):
    name = program.get_method_name(index)
    if name != "forward":
        print(name, *program.load_method(name)(()), file=sys.stderr)
"""
    finished = subprocess.run(
        [sys.executable, "-c", script, str(toy("fp32").artifact.path)], capture_output=True, text=True, check=True
    )
    described = dict(line.split(maxsplit=1) for line in finished.stderr.splitlines() if line.startswith(("get", "use")))
    assert described["get_max_seq_len"] == described["get_max_context_len"] == str(CONTEXT)
    assert described["get_vocab_size"] == "160"
    assert described["get_bos_id"] == "1"
    assert described["get_eos_ids"] == "2 3"
    assert described["use_kv_cache"] == described["use_sdpa_with_kv_cache"] == "True"


@pytest.mark.toolchain
@pytest.mark.parametrize(("length", "wanted"), [(31, 32), (33, 32)])
def test_codes_of_a_wrong_length_are_refused_by_the_emitter(length: int, wanted: int) -> None:
    from targets.executorch.xnnpack import Segment, xnn

    with pytest.raises(LoweringError, match=f"q has {length} bytes, its shape wants {wanted}"):
        Segment().constant("q", bytes(length), shape=(8, 8), datatype=xnn.XNNDatatype.xnn_datatype_qbint4)


@pytest.mark.toolchain
def test_scales_of_a_wrong_length_cannot_be_written(tmp_path: Path) -> None:
    """A QuantizedTensor of wrong shapes does not come into being, so the emitter never sees one."""
    with pytest.raises(ValueError, match="scales are"):
        QuantizedTensor(name="q", bits=4, group_size=32, codes=torch.zeros(8, 64).char(), scales=torch.ones(8, 1))


@pytest.mark.toolchain
def test_attention_through_a_window_is_refused(toy: Callable[[str], Lowered], tmp_path: Path) -> None:
    lowered = toy("fp32")
    changed = tuple(
        replace(node, arguments=(*node.arguments[:9], 8, 0)) if node.op == "attention" else node
        for node in lowered.graph.nodes
    )
    with pytest.raises(LoweringError, match="attention with window 8 has no lowering"):
        TARGET.lower(replace(lowered.graph, nodes=changed), lowered.store, lowered.plan, tmp_path)
    assert not list(tmp_path.iterdir())


def test_groups_that_do_not_divide_the_columns_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    plan = Plan(
        checkpoint=checkpoint,
        targets=("executorch",),
        scheme=scheme_of("int4", group_size=64),
        context=CONTEXT,
        recipe=ROUNDED,
        sampling=Sampling(),
        out=tmp_path,
        store=tmp_path,
        evaluation_text=tmp_path,
        threads=1,
    )
    reason = TARGET.refuse(read_spec(checkpoint), plan)
    assert reason == "model.layers.0.mlp.down_proj.weight has 96 columns, which int4 groups of 64 do not divide"
    assert TARGET.refuse(read_spec(checkpoint), replace(plan, scheme=scheme_of("int4"))) is None
    assert TARGET.refuse(read_spec(checkpoint), replace(plan, scheme=scheme_of("int4", group_size=PER_ROW))) is None
    spared = scheme_of("int4", group_size=64, rules={"layers.*.mlp.down_proj": "int8"})
    assert TARGET.refuse(read_spec(checkpoint), replace(plan, scheme=spared)) is None
    assert "at least 4" in (TARGET.refuse(read_spec(checkpoint), replace(plan, context=2)) or "")


# --- the runner --------------------------------------------------------------------------------------------------


@pytest.mark.toolchain
def test_the_whole_context_can_be_fed_at_once_and_again_after_a_rewind(toy: Callable[[str], Lowered]) -> None:
    lowered, ids = toy("fp32"), tokens(CONTEXT)
    expected = lowered.reference().feed(ids)
    with TARGET.open(lowered.artifact, threads=1) as runner:
        assert (runner.feed(ids) - expected).abs().max() < 1e-4
        assert runner.position == CONTEXT
        runner.rewind(20)
        assert (runner.feed(ids[20:21]) - expected[20]).abs().max() < 1e-4
        runner.rewind(0)
        runner.feed(ids[::-1])
        runner.rewind(0)
        assert (feed_in_cuts(runner, ids, (1, CONTEXT - 1)) - expected).abs().max() < 1e-4


@pytest.mark.toolchain
@pytest.mark.parametrize("name", ["fp32", "int4, int8 in places"])
def test_a_program_that_is_opened_computes_to_the_bit_what_it_did(toy: Callable[[str], Lowered], name: str) -> None:
    lowered, calls = toy(name), [tokens(17), [5], [7, 9, 11]]
    observation = TARGET.observe(lowered.artifact, graph=lowered.graph, calls=calls, threads=1)
    with TARGET.open(lowered.artifact, threads=1) as runner:
        for ids, seen in zip(calls, observation.calls, strict=True):
            assert torch.equal(seen[lowered.graph.outputs["logits"]][0], runner.feed(ids))
            assert len(seen) == len(lowered.graph.nodes) + 2 * lowered.graph.spec.num_hidden_layers  # and the caches


@pytest.mark.toolchain
def test_what_cannot_be_fed_is_refused_and_changes_nothing(toy: Callable[[str], Lowered]) -> None:
    lowered, ids = toy("fp32"), tokens(CONTEXT)
    with TARGET.open(lowered.artifact, threads=1) as runner:
        first = runner.feed(ids[:40])
        with pytest.raises(InputError, match="9 tokens at position 40 do not fit a context of 48"):
            runner.feed(ids[:9])
        with pytest.raises(InputError, match="token 160 is outside the vocabulary of 160"):
            runner.feed([1, 160])
        with pytest.raises(InputError, match="0 tokens at position"):
            runner.feed([])
        with pytest.raises(InputError, match="cannot rewind to position 41: the cache holds 40 tokens"):
            runner.rewind(41)
        assert runner.position == 40
        runner.rewind(0)
        assert torch.equal(runner.feed(ids[:40]), first)


@pytest.mark.toolchain
def test_an_error_of_the_runtime_is_told_in_its_own_words_and_the_runner_goes_on(toy: Callable[[str], Lowered]) -> None:
    larger = replace(toy("fp32").artifact, context=100)  # which the program is not made for
    with TARGET.open(larger, threads=1) as runner:
        with pytest.raises(LoweringError, match="maximum capacity of 48 elements to 49 elements"):
            runner.feed([1] * 49)
        assert runner.feed([1]).shape == (1, 160)


@pytest.mark.toolchain
def test_a_program_that_does_not_load_is_told_with_the_reason(toy: Callable[[str], Lowered], tmp_path: Path) -> None:
    whole = toy("int4").artifact
    contents = whole.path.read_bytes()
    faults = {
        "cut": (contents[: len(contents) // 2], "File size is too small"),
        "unnamed": (contents.replace(b"q_proj.weight.codes", b"q_proj.weight.codez", 1), "q_proj.weight.codes"),
        "other": (b"GGUF" * 100, "Program identifier"),
    }
    for name, (data, reason) in faults.items():
        damaged = replace(whole, path=tmp_path / f"{name}.pte")
        damaged.path.write_bytes(data)
        with pytest.raises(LoweringError, match=rf"could not load {name}\.pte: .*{reason}"):
            TARGET.open(damaged, threads=1)


@pytest.mark.toolchain
def test_a_worker_that_the_system_killed_is_a_matter_of_capacity(toy: Callable[[str], Lowered]) -> None:
    with ProgramRunner(toy("fp32").artifact, threads=1) as runner:
        os.kill(runner.pid, signal.SIGKILL)
        with pytest.raises(CapacityError, match="want of memory"):
            runner.feed([1])


@pytest.mark.toolchain
def test_closing_a_runner_ends_its_process(toy: Callable[[str], Lowered]) -> None:
    with ProgramRunner(toy("fp32").artifact, threads=1) as runner:
        assert runner.load_s > 0
        os.kill(runner.pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(runner.pid, 0)
    runner.close()  # a second time


@pytest.mark.toolchain
@pytest.mark.parametrize("prompt", ["I have the honour", "Fellow-citizens of the Senate"])
def test_executorchs_own_runner_gives_the_text_that_the_reference_gives(prompt: str, tmp_path: Path) -> None:
    """The C++ runner of the Android and iOS libraries, in a process of its own: it may abort."""
    scheme = scheme_of("int4", embedding="int8", head="int8")
    lowered = Lowered(BUNDLED_MODEL, scheme, Logits.LAST, context=256, out=tmp_path)
    tokenizer = Tokenizer.from_file(str(BUNDLED_MODEL / "tokenizer.json"))
    ids = tokenizer.encode(prompt).ids
    answer = clear_tokens(lowered.reference().greedy(ids, count=12, stops=lowered.graph.spec.eos_token_ids))
    assert len(answer) >= 4
    expected = tokenizer.decode(answer)
    assert expected.isascii()
    script = """
import sys, warnings
warnings.simplefilter("ignore")
import executorch.extension.llm.custom_ops.custom_ops, executorch.kernels.quantized
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
program, tokenizer, prompt, count, out = sys.argv[1:]
pieces = []
runner = TextLLMRunner(program, tokenizer)
config = GenerationConfig(temperature=0.0, max_new_tokens=int(count), echo=False, num_bos=1)
runner.generate(prompt, config, pieces.append, None)
open(out, "w", encoding="utf-8").write("".join(pieces))
"""
    text = tmp_path / "text.txt"
    command = [sys.executable, "-c", script, str(lowered.artifact.path), str(BUNDLED_MODEL / "tokenizer.json")]
    subprocess.run([*command, prompt, str(len(answer)), str(text)], check=True, capture_output=True)
    assert text.read_text(encoding="utf-8") == expected


# --- the border --------------------------------------------------------------------------------------------------


def test_importing_the_target_imports_no_toolchain() -> None:
    script = "import sys, targets.executorch; print({'executorch', 'torchao', 'torch'} & set(sys.modules))"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "set()"


def test_a_missing_executorch_names_the_command_that_installs_it() -> None:
    with pytest.raises(MissingToolError, match="No module named 'executorch'") as caught, border.toolchain("be found"):
        raise ModuleNotFoundError("No module named 'executorch'")
    assert caught.value.hint == "install it with: pip install executorch==1.4.1"


def test_a_foreign_exception_is_mapped_with_its_first_line() -> None:
    with (
        pytest.raises(LoweringError, match=r"^ExecuTorch could not bake: too hot$") as caught,
        border.toolchain("bake"),
    ):
        raise AssertionError("too hot\n  at 300 degrees")
    assert isinstance(caught.value.__cause__, AssertionError)


def test_activations_count_as_rounded_wherever_a_matrix_is_quantized() -> None:
    assert TARGET.arithmetic(scheme_of("fp16")).activations is Activations.FLOAT
    assert TARGET.arithmetic(scheme_of("int4")).activations is Activations.INT8_PER_TOKEN
    assert TARGET.arithmetic(scheme_of("fp32", head="int8")).activations is Activations.INT8_PER_TOKEN
    assert TARGET.arithmetic(scheme_of("fp32", rules={"*.k_proj": "int8"})).activations is Activations.INT8_PER_TOKEN
