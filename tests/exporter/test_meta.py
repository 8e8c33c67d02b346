"""Meta's own layout: what transformers has, written as Meta writes it, is read back bit for bit."""

from __future__ import annotations

import base64
import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from exporter.checkpoint import BUNDLED_MODEL, open_checkpoint, read_spec
from exporter.checkpoint.meta_tokenizer import SPECIAL_TOKENS, write_tokenizer
from exporter.cli import app
from exporter.errors import InputError
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace
from exporter.spec import ModelSpec, RopeKind
from exporter.tokenizer import Tokenizer, open_tokenizer
from tests.conftest import TOY, Toy

ROWS, COLUMNS = 0, 1
PARAMS = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 32,
    "vocab_size": 96,
    "multiple_of": 96,
    "ffn_dim_multiplier": 0.5,
    "norm_eps": 1e-5,
    "max_seq_len": 64,
}
"""``tests.conftest.TOY`` in Meta's words: int(0.5 * int(8 * 64 / 3)) is 85, of which the next multiple of 96 is 96."""
AXES = {
    "attention.wq": ROWS,
    "attention.wk": ROWS,
    "attention.wv": ROWS,
    "attention.wo": COLUMNS,
    "feed_forward.w1": ROWS,
    "feed_forward.w2": COLUMNS,
    "feed_forward.w3": ROWS,
}
"""meta-llama/llama, llama/model.py: ColumnParallelLinear cuts rows of the stored weight, RowParallelLinear columns."""
WORDS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{letter}_proj": f"attention.w{letter}" for letter in "qkvo"},
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "embed_tokens": "tok_embeddings",
}


def interleaved(weight: Tensor, *, head_dim: int) -> Tensor:
    """Rows of a head 0, half, 1, half + 1, ...: the pairs that Meta's RoPE turns lie side by side."""
    order = [row for pair in range(head_dim // 2) for row in (pair, pair + head_dim // 2)]
    return torch.cat([head[order] for head in weight.split(head_dim)])


def theirs(toy: Toy) -> dict[str, Tensor]:
    """The toy's whole tensors as Meta names and orders them."""
    config, found = toy.model.config, {}
    for name, weight in toy.model.state_dict().items():
        if name == "lm_head.weight":
            if not config.tie_word_embeddings:
                found["output.weight"] = weight.clone()
            continue
        renamed = name.removeprefix("model.")
        for ours, word in WORDS.items():
            renamed = renamed.replace(ours, word)
        turned = renamed.endswith(("wq.weight", "wk.weight"))
        found[renamed] = interleaved(weight, head_dim=config.head_dim) if turned else weight.clone()
    return found


def cut(name: str, weight: Tensor, *, shards: int, embedding_axis: int, kv_heads: int) -> list[Tensor]:
    kind = name.removesuffix(".weight").split(".", 2)[-1]
    axis = {**AXES, "tok_embeddings": embedding_axis, "output": ROWS}.get(kind)
    if axis is None:
        return [weight.clone()] * shards
    if kind in ("attention.wk", "attention.wv") and kv_heads < shards:
        return [part.clone() for part in weight.chunk(kv_heads) for _ in range(shards // kv_heads)]
    return [part.clone() for part in weight.chunk(shards, dim=axis)]


def write_meta(toy: Toy, folder: Path, *, shards: int = 1, embedding_axis: int = COLUMNS, **params: Any) -> Path:
    """The toy in Meta's layout; ``params``: fields of params.json over ``PARAMS``, None removes one."""
    folder.mkdir()
    described = {field: value for field, value in {**PARAMS, **params}.items() if value is not None}
    (folder / "params.json").write_text(json.dumps(described))
    kv_heads = toy.model.config.num_key_value_heads
    parts = {
        name: cut(name, weight, shards=shards, embedding_axis=embedding_axis, kv_heads=kv_heads)
        for name, weight in theirs(toy).items()
    }
    for index in range(shards):
        shard = {name: each[index] for name, each in parts.items()}
        torch.save({**shard, "rope.freqs": torch.ones(16)}, folder / f"consolidated.{index:02}.pth")
    return folder


@pytest.fixture
def meta(make_toy: Callable[..., Toy], tmp_path: Path) -> Path:
    """The toy in two shards, whose head is its own."""
    return write_meta(make_toy(tie_word_embeddings=False), tmp_path / "meta", shards=2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embedding_axis", [ROWS, COLUMNS])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_every_tensor_is_what_transformers_has(
    shards: int, embedding_axis: int, tied: bool, make_toy: Callable[..., Toy], tmp_path: Path
) -> None:
    toy = make_toy(tie_word_embeddings=tied)
    checkpoint = open_checkpoint(
        write_meta(toy, tmp_path / "meta", shards=shards, embedding_axis=embedding_axis, vocab_size=-1)
    )
    assert checkpoint.spec.tie_word_embeddings == tied
    assert checkpoint.spec.vocab_size == TOY["vocab_size"]
    expected = toy.model.state_dict()
    for name in checkpoint.spec.weights():
        lazy = checkpoint.tensors[name]
        read = lazy.read()
        assert torch.equal(read, expected[name]), name
        assert (lazy.shape, lazy.dtype) == (tuple(read.shape), read.dtype)


def test_half_precision_is_kept(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    toy = make_toy()
    toy.model.to(torch.bfloat16)
    checkpoint = open_checkpoint(write_meta(toy, tmp_path / "meta", shards=2))
    expected = toy.model.state_dict()
    for name in checkpoint.spec.weights():
        assert checkpoint.read(name).dtype is torch.bfloat16
        assert torch.equal(checkpoint.read(name), expected[name])


@pytest.mark.parametrize("embedding_axis", [ROWS, COLUMNS])
def test_logits_are_those_of_transformers(embedding_axis: int, make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    toy = make_toy(
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    folder = write_meta(
        toy, tmp_path / "meta", shards=2, embedding_axis=embedding_axis, rope_theta=5e5, use_scaled_rope=True
    )
    checkpoint = open_checkpoint(folder)
    ids = torch.randint(0, 96, (48,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = toy.model(ids[None]).logits[0]
    got = logits(checkpoint, ids)
    assert (got - expected).abs().max() < 1e-4


def logits(checkpoint: Any, ids: Tensor) -> Tensor:
    return Reference(trace(checkpoint.spec), checkpoint, FULL_PRECISION).feed(ids.tolist())


def test_the_digest_is_stable_and_changes_with_a_weight_of_any_shard(meta: Path) -> None:
    before = open_checkpoint(meta).sha256
    assert open_checkpoint(meta).sha256 == before
    file = meta / "consolidated.01.pth"
    shard = torch.load(file)
    shard["layers.1.feed_forward.w2.weight"][0, 0] += 1
    file.unlink()
    torch.save(shard, file)
    assert open_checkpoint(meta).sha256 != before


def test_copies_of_a_key_value_head_must_agree(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    folder = write_meta(make_toy(), tmp_path / "meta", shards=4)
    edit(folder / "consolidated.03.pth", lambda shard: shard["layers.0.attention.wv.weight"].add_(1))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(InputError, match=r"consolidated.02.pth and consolidated.03.pth differ in a key-value head"):
        checkpoint.read("model.layers.0.self_attn.v_proj.weight")


def edit(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    shard = torch.load(file)
    change(shard)
    torch.save(shard, file)


def set_param(folder: Path, **fields: Any) -> None:
    path = folder / "params.json"
    params = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({field: value for field, value in params.items() if value is not None}))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"vocab_size": 100}, "output.weight is [48, 64] in 2 shards, params.json wants [100, 64] in all"),
        ({"multiple_of": 100}, "layers.0.feed_forward.w1.weight is [48, 64] in 2 shards, params.json wants [100, 64]"),
        ({"n_layers": 3}, "9 missing"),
        ({"n_layers": 1}, "9 unknown"),
        ({"moe": {"num_experts": 16}}, "moe is {'num_experts': 16}; known: dim, "),
        ({"vision_chunk_size": 448}, "vision_chunk_size is 448; known: dim, "),
        ({"dim": "64"}, "dim is '64', a positive integer was expected"),
        ({"dim": None}, "dim is missing, a positive integer was expected"),
        ({"dim": 66, "head_dim": None}, "dim (66) is not divisible by n_heads (4)"),
        ({"norm_eps": None}, "norm_eps is missing, a positive number was expected"),
        ({"n_kv_heads": 3}, "num_attention_heads (4) must be divisible by num_key_value_heads (3)"),
        ({"use_scaled_rope": 1}, "use_scaled_rope is 1, true or false was expected"),
        ({"rope_theta": 1234.0, "max_seq_len": None}, "rope_theta is 1234, which tells of no number of positions"),
    ],
)
def test_params_that_do_not_fit_are_refused_with_what_was_found(meta: Path, fields: dict[str, Any], says: str) -> None:
    set_param(meta, **fields)
    with pytest.raises(InputError, match=re.escape(says)):
        open_checkpoint(meta)


def test_fields_without_effect_are_passed_over(meta: Path) -> None:
    before = read_spec(meta)
    set_param(meta, max_batch_size=32, quantization_args=None, vision=False)
    assert read_spec(meta) == before


def test_a_missing_shard_is_named(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    folder = write_meta(make_toy(), tmp_path / "meta", shards=4)
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(InputError, match=r"has consolidated.03.pth, but consolidated.01.pth is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_one_shard_too_few_or_too_many_fits_no_axis(tied: bool, make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    folder = write_meta(make_toy(tie_word_embeddings=tied), tmp_path / "meta", shards=2)
    last = (folder / "consolidated.01.pth").read_bytes()
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(InputError, match=r"in 1 shard, params.json wants"):
        open_checkpoint(folder)
    for name in ("consolidated.01.pth", "consolidated.02.pth"):
        (folder / name).write_bytes(last)
    with pytest.raises(InputError, match=r"in 3 shards, params.json wants"):
        open_checkpoint(folder)


def test_no_weights_at_all_are_told(meta: Path) -> None:
    for file in meta.glob("*.pth"):
        file.unlink()
    with pytest.raises(InputError, match=r"has no consolidated.00.pth"):
        open_checkpoint(meta)


@pytest.mark.parametrize("keep", [0, 1000, -1000])
def test_a_truncated_shard_is_told(meta: Path, keep: int) -> None:
    file = meta / "consolidated.01.pth"
    content = file.read_bytes()[:keep]
    file.unlink()
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"consolidated.01.pth is n"):
        open_checkpoint(meta)


def test_a_tensor_that_one_shard_lacks_is_named(meta: Path) -> None:
    edit(meta / "consolidated.01.pth", lambda shard: shard.pop("norm.weight"))
    with pytest.raises(InputError, match=r"norm.weight is missing in consolidated.01.pth"):
        open_checkpoint(meta)


def test_config_json_comes_first(make_toy: Callable[..., Toy]) -> None:
    toy = make_toy()
    (toy.folder / "params.json").write_text("{}")
    assert open_checkpoint(toy.folder).described_by.name == "config.json"


OLD = {"multiple_of": 256, "vocab_size": -1}
NEW = {"n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-5, "rope_theta": 500000.0}
SCALED = {**NEW, "use_scaled_rope": True}


def params(dim: int, layers: int, heads: int, **fields: Any) -> dict[str, Any]:
    return {"dim": dim, "n_layers": layers, "n_heads": heads, **fields}


RELEASES: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "llama-7b": (params(4096, 32, 32, norm_eps=1e-6, **OLD), (11008, 32, 2048, 1.0, False)),
    "llama-13b": (params(5120, 40, 40, norm_eps=1e-6, **OLD), (13824, 40, 2048, 1.0, False)),
    "llama-65b": (params(8192, 80, 64, norm_eps=1e-5, **OLD), (22016, 64, 2048, 1.0, False)),
    "llama-2-7b": (params(4096, 32, 32, norm_eps=1e-5, **OLD), (11008, 32, 4096, 1.0, False)),
    "llama-2-70b": (
        params(8192, 80, 64, n_kv_heads=8, norm_eps=1e-5, multiple_of=4096, ffn_dim_multiplier=1.3, vocab_size=-1),
        (28672, 8, 4096, 1.0, False),
    ),
    "code-llama-7b": (
        params(4096, 32, 32, norm_eps=1e-5, multiple_of=256, ffn_dim_multiplier=1.0, rope_theta=1000000),
        (11008, 32, 16384, 1.0, False),
    ),
    "llama-3-8b": (params(4096, 32, 32, multiple_of=1024, ffn_dim_multiplier=1.3, **NEW), (14336, 8, 8192, 1.0, False)),
    "llama-3.1-70b": (
        params(8192, 80, 64, multiple_of=4096, ffn_dim_multiplier=1.3, **SCALED),
        (28672, 8, 131072, 8.0, False),
    ),
    "llama-3.1-405b": (
        params(16384, 126, 128, multiple_of=4096, ffn_dim_multiplier=1.2, **SCALED),
        (53248, 8, 131072, 8.0, False),
    ),
    "llama-3.2-1b": (
        params(2048, 16, 32, multiple_of=256, ffn_dim_multiplier=1.5, **SCALED),
        (8192, 8, 131072, 32.0, True),
    ),
    "llama-3.2-3b": (
        params(3072, 28, 24, multiple_of=256, ffn_dim_multiplier=1.0, **SCALED),
        (8192, 8, 131072, 32.0, True),
    ),
}
"""params.json of the release, and of its config.json in Hugging Face layout: intermediate_size, num_key_value_heads,
max_position_embeddings, factor of llama3 RoPE, tie_word_embeddings."""
VOCABULARIES = {"code-llama-7b": 32016}


def read_release(name: str, folder: Path) -> ModelSpec:
    """Its spec; where params.json has no vocab_size, of an embedding of the release's shape."""
    fields, _ = RELEASES[name]
    (folder / "params.json").write_text(json.dumps(fields))
    if fields.get("vocab_size", -1) == -1:
        rows = torch.zeros(1).expand(VOCABULARIES.get(name, 32000), fields["dim"])
        torch.save(
            {"tok_embeddings.weight": rows, "output.weight": rows}, folder / "consolidated.00.pth"
        )  # one number on disk
    return read_spec(folder)


@pytest.mark.parametrize("name", RELEASES)
def test_released_params_are_the_models_that_transformers_has(name: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    spec = read_release(name, tmp_path)
    fields, (intermediate, kv_heads, positions, factor, tied) = RELEASES[name]
    config = LlamaConfig(
        vocab_size=VOCABULARIES.get(name, 128256 if name >= "llama-3" and name[6] == "3" else 32000),
        hidden_size=fields["dim"],
        intermediate_size=intermediate,
        num_hidden_layers=fields["n_layers"],
        num_attention_heads=fields["n_heads"],
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert spec.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (spec.max_position_embeddings, spec.rope.factor, spec.tie_word_embeddings) == (positions, factor, tied)
    assert spec.rope.kind is (RopeKind.LLAMA3 if factor > 1 else RopeKind.DEFAULT)
    if fields.get("rope_theta") == 5e5:
        assert (spec.bos_token_id, spec.eos_token_ids) == (128000, (128001, 128008, 128009))
    else:
        assert (spec.bos_token_id, spec.eos_token_ids) == (1, (2,))


# Tokenizers

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""meta-llama/llama3, llama/tokenizer.py."""
LINES = [
    *(line for line in (BUNDLED_MODEL / "evaluation.txt").read_text(encoding="utf-8").splitlines() if line),
    *["naïve café 你好世界 こんにちは 👍🏽 مرحبا שלום"] * 30,
    *["    indented   code\treturn  x1234567", "aaaa abab ababab a a a"] * 20,
]
NASTY = [
    *("", " ", "   ", " a", "a ", "  a  b   c", "\t\n x\r\n", "\n\n\n", " " * 33, "a" * 77, "ab" * 50),
    *(
        "e\u0301 cafe\u0301",
        "👍🏽👨‍👩‍👧",
        "你好,世界",
        "مرحبا שלום",
        "1234567 3.14",
        "\u017f's 'S it'S don't",
        "\x00\x01",
    ),
    *("<0x0A>", "< s>", "<unk>", "<|eot_id", "<|eot_id |>", "\u2581a \u2581", "\u3000x\u00a0y\u2028z\u0085"),
]
ALPHABET = [
    *"   \t\n\r\x00abcdeABES'.,<>|_0123é👍你ا\u0301\u3000\u00a0\u2028\u0085\u017f\u2581",
    "<|eot",
    "the",
    " ab",
    "<0x41>",
]


def texts() -> list[str]:
    chosen = random.Random(0)
    return [
        *NASTY,
        *LINES[:100],
        *("".join(chosen.choices(ALPHABET, k=chosen.randint(1, 60))) for _ in range(1000)),
    ]


def train_sentencepiece(**settings: Any) -> bytes:
    """A small BPE model with the settings of Llama 2's."""
    import sentencepiece

    model = io.BytesIO()
    llama = {
        "model_type": "bpe",
        "vocab_size": 1000,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=model, **{**llama, **settings})
    return model.getvalue()


@pytest.fixture(scope="module")
def pieces() -> bytes:
    return train_sentencepiece()


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """Of a small byte-level BPE that splits text as Llama 3's does."""
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=900, show_progress=False, initial_alphabet=alphabet)
    )
    bytes_of = {letters.pre_tokenize_str(chr(byte))[0][0]: byte for byte in range(128)}
    high = sorted(set(alphabet) - bytes_of.keys())  # of bytes from 128 on: those shown as they are, then the others
    shown = [letter for letter in high if ord(letter) < 256]
    hidden = [byte for byte in range(128, 256) if chr(byte) not in shown]
    bytes_of |= {letter: ord(letter) for letter in shown}
    bytes_of |= dict(zip([letter for letter in high if ord(letter) > 255], hidden, strict=True))
    return {bytes(bytes_of[letter] for letter in token): rank for token, rank in backend.get_vocab().items()}


def in_lines(ranks: dict[bytes, int]) -> bytes:
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered)


def converted(model: bytes, folder: Path) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(model)
    write_tokenizer(folder, folder / "converted")
    return Tokenizer(folder / "converted")


@pytest.mark.parametrize("prefix", [True, False])
def test_ids_are_those_of_sentencepiece(prefix: bool, tmp_path: Path) -> None:
    import sentencepiece
    from transformers import AutoTokenizer

    model = train_sentencepiece(add_dummy_prefix=prefix)
    tokenizer, original = converted(model, tmp_path), sentencepiece.SentencePieceProcessor(model_proto=model)
    elsewhere = AutoTokenizer.from_pretrained(tokenizer.folder, local_files_only=True)
    for text in texts():
        ids = original.encode(text)
        assert tokenizer.encode(text) == [1, *ids], repr(text)
        assert elsewhere.encode(text) == [1, *ids], repr(text)
        assert tokenizer.decode(ids) == original.decode(ids), repr(text)
    assert tokenizer.encode("a</s>")[-1] == 2
    assert tokenizer.special_ids == {1, 2}


def test_ids_are_those_of_tiktoken(ranks: dict[bytes, int], tmp_path: Path) -> None:
    import tiktoken

    special = {token: len(ranks) + index for index, token in enumerate(SPECIAL_TOKENS)}
    original = tiktoken.Encoding("llama3", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    tokenizer = converted(in_lines(ranks), tmp_path)
    for text in [*texts(), "<|eot_id|>a <|python_tag|><|begin_of_text|> <|reserved_special_token_247|>"]:
        ids = original.encode(text, allowed_special="all")
        assert tokenizer.encode(text) == [len(ranks), *ids], repr(text)
        if "<|eot_id|>" not in text:
            assert tokenizer.decode(ids) == text
    assert tokenizer.special_ids == set(special.values())


def test_special_tokens_of_llama3_have_their_places() -> None:
    """As in tokenizer_config.json of Llama 3.1 in Hugging Face layout."""
    places = {
        "<|begin_of_text|>": 0,
        "<|end_of_text|>": 1,
        "<|reserved_special_token_0|>": 2,
        "<|reserved_special_token_1|>": 3,
        "<|finetune_right_pad_id|>": 4,
        "<|reserved_special_token_2|>": 5,
        "<|start_header_id|>": 6,
        "<|end_header_id|>": 7,
        "<|eom_id|>": 8,
        "<|eot_id|>": 9,
        "<|python_tag|>": 10,
        "<|reserved_special_token_3|>": 11,
        "<|reserved_special_token_247|>": 255,
    }
    assert {token: SPECIAL_TOKENS.index(token) for token in places} == places
    assert len(set(SPECIAL_TOKENS)) == 256


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model_type": "unigram"}, "model_type is 1; known: 2"),
        ({"byte_fallback": False}, "<0x00>"),
        ({"normalization_rule_name": "nfkc"}, "precompiled_charsmap is "),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is 1; known: none"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix is 1; known: none"),
        ({"user_defined_symbols": ["<PRE>"]}, "piece '<PRE>' is of type 4; known: normal (1)"),
    ],
)
def test_a_sentencepiece_model_with_other_settings_is_refused(
    settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        converted(train_sentencepiece(**settings), tmp_path)
    assert not (tmp_path / "converted").exists()


def test_a_tokenizer_that_is_none_is_told(pieces: bytes, ranks: dict[bytes, int], tmp_path: Path) -> None:
    lines = in_lines(ranks)
    for content in (b"", b"a text", pieces[:-7], pieces[:5000], lines[:-4], lines[:3000], lines + b"YWI= 7\n"):
        with pytest.raises(InputError, match="is neither a whole SentencePiece model nor a whole file of tiktoken"):
            converted(content, tmp_path)


def test_a_tokenizer_is_converted_once(meta: Path, pieces: bytes, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(InputError, match=r"has no tokenizer.model"):
        open_tokenizer(meta, cache=cache)
    (meta / "tokenizer.model").write_bytes(pieces)
    first = open_tokenizer(meta, cache=cache)
    assert {path.name for path in first.folder.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    written = (first.folder / "tokenizer.json").stat().st_mtime_ns
    again = open_tokenizer(meta, cache=cache)
    assert (again.folder, (again.folder / "tokenizer.json").stat().st_mtime_ns) == (first.folder, written)
    assert [path.name for path in cache.iterdir()] == [first.folder.name]
    (meta / "tokenizer.model").write_bytes(train_sentencepiece(vocab_size=900))
    assert open_tokenizer(meta, cache=cache).folder != first.folder
    assert open_tokenizer(BUNDLED_MODEL, cache=cache).folder == BUNDLED_MODEL


def test_special_tokens_and_size_follow_from_the_tokenizer(meta: Path, pieces: bytes, ranks: dict[bytes, int]) -> None:
    set_param(meta, vocab_size=-1)
    (meta / "tokenizer.model").write_bytes(pieces)
    spec = read_spec(meta)
    assert (spec.vocab_size, spec.bos_token_id, spec.eos_token_ids) == (1000, 1, (2,))
    (meta / "tokenizer.model").write_bytes(in_lines(ranks))
    spec = read_spec(meta)
    assert (spec.vocab_size, spec.bos_token_id, spec.eos_token_ids) == (1156, 900, (901, 908, 909))
    set_param(meta, vocab_size=905)
    assert read_spec(meta).eos_token_ids == (901,)


@pytest.mark.toolchain
@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken"])
def test_a_folder_of_metas_is_exported_and_proven(
    kind: str, pieces: bytes, ranks: dict[bytes, int], make_toy: Callable[..., Toy], tmp_path: Path
) -> None:
    vocab_size = 1000 if kind == "sentencepiece" else 1156
    toy = make_toy(vocab_size=vocab_size, tie_word_embeddings=False)
    folder = write_meta(toy, tmp_path / "meta", shards=2, vocab_size=-1)
    (folder / "tokenizer.model").write_bytes(pieces if kind == "sentencepiece" else in_lines(ranks))
    (folder / "LICENSE").write_text("terms")
    out, store = str(tmp_path / "out"), str(tmp_path / "store")
    words = [str(folder), "-t", "onnxruntime", "-p", "fp32", "--context", "64", "-o", out, "--store", store]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    bundle = tmp_path / "out" / "onnxruntime"
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert {manifest[verdict]["verdict"] for verdict in ("codes", "parity", "quality", "latency")} == {"passed"}
    text = "The people of the United States 👍"
    cached = open_tokenizer(folder, cache=tmp_path / "store")
    assert Tokenizer(bundle).encode(text) == cached.encode(text)
    assert (bundle / "LICENSE").read_text() == "terms"
    done = CliRunner().invoke(app, ["validate", str(bundle), "--against", str(folder), "--store", store])
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def all_ranks() -> dict[bytes, int]:
    """As many as Llama 3 has: bytes, then pairs and triples of what can be typed, then four letters; each comes of two
    that are there before it."""
    typed = [bytes([byte]) for byte in range(32, 127)]
    letters = [bytes([byte]) for byte in b"abcdefghijklmnopqrstuvwxyz"]
    pairs = [left + right for left in typed for right in typed]
    triples = [pair + letter for pair in pairs for letter in letters[:10]]
    longer = [triple + letter for triple in triples for letter in letters]
    tokens = [bytes([byte]) for byte in range(256)] + pairs + triples + longer
    return {token: rank for rank, token in enumerate(tokens[:128_000])}


@pytest.mark.slow
@pytest.mark.toolchain
@pytest.mark.parametrize("target", ["executorch", "onnxruntime", "coreml", "gguf"])
def test_a_vocabulary_of_llama3s_size_works_end_to_end(
    target: str, all_ranks: dict[bytes, int], make_toy: Callable[..., Toy], tmp_path: Path
) -> None:
    """Export and proofs, then a chat of special tokens by the bundle alone: 128,256 ids, the last of them used."""
    import tiktoken

    toy = make_toy(vocab_size=128_256, tie_word_embeddings=False)
    folder = write_meta(toy, tmp_path / "meta", vocab_size=-1)
    (folder / "tokenizer.model").write_bytes(in_lines(all_ranks))
    words = [str(folder), "-t", target, "-p", "fp16", "--context", "64"]
    done = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "out"), "--store", str(tmp_path / "store")])
    assert done.exit_code == 0, done.output
    bundle = tmp_path / "out" / target
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert {manifest[verdict]["verdict"] for verdict in ("codes", "parity")} == {"passed"}, manifest["parity"]
    assert manifest["model"]["vocab_size"] == 128_256
    special = {token: len(all_ranks) + index for index, token in enumerate(SPECIAL_TOKENS)}
    original = tiktoken.Encoding("llama3", pat_str=PATTERN, mergeable_ranks=all_ranks, special_tokens=special)
    text = "<|start_header_id|>user<|end_header_id|>\n\nThe 1984 naïve 👍<|eot_id|><|reserved_special_token_247|>"
    ids = Tokenizer(bundle).encode(text)
    assert ids == [128_000, *original.encode(text, allowed_special="all")]
    assert ids[-1] == 128_255
