"""A head of some tokens only: the same logits at theirs as the whole model has, and a floor at all others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

import targets
from calibration.layers import SILENT
from exporter.checkpoint import LazyCodes, open_checkpoint, read_codes, read_spec
from exporter.checkpoint.pruned import read_head_tokens
from exporter.errors import InputError
from exporter.forecast import foresee
from exporter.kept import kept_scheme
from exporter.metrics import kl_divergence
from exporter.model.graph import Graph, in_slices
from exporter.model.ops import FLOOR
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace
from exporter.planning import plan
from exporter.quality import measure_quality
from exporter.spec import EMBEDDING, HEAD, Plan
from exporter.texts import read_texts
from exporter.tokenizer import open_tokenizer
from tests.conftest import TOY, Toy
from tests.exporter.test_meta import write_meta
from tests.formats import Written, ggufs, metas_codes
from tests.generations import config_of

TOKENS = (2, 61, 7, 90, 33)
"""Of a toy; in no order, with a stop token (2) among them."""
IDS = [1, 5, 90, 33, 8, 61, 7, 2, 40, 41]
OTHERS = [token for token in range(TOY["vocab_size"]) if token not in TOKENS]


def pruned(folder: Path) -> tuple[Graph, Reference]:
    checkpoint = open_checkpoint(folder, head_tokens=TOKENS)
    graph = trace(checkpoint.spec)
    return graph, Reference(graph, checkpoint, FULL_PRECISION)


def answer(toy: Toy) -> Tensor:
    """What transformers says after each of ``IDS``, with every row of the head."""
    with torch.no_grad():
        logits: Tensor = toy.model(torch.tensor([IDS])).logits[0]
    return logits


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_transformers_at_the_tokens_that_are_kept(tied: bool, make_toy: Callable[..., Toy]) -> None:
    toy = make_toy(tie_word_embeddings=tied)
    _, reference = pruned(toy.folder)
    got = torch.cat([reference.feed(IDS[:4]), reference.feed(IDS[4:])])
    assert got.shape == (len(IDS), TOY["vocab_size"])
    assert (got[:, TOKENS] - answer(toy)[:, TOKENS]).abs().max() < 1e-4
    assert (got[:, OTHERS] == FLOOR).all()


def test_the_floor_is_exact_in_half_precision_and_has_no_probability() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.tensor(FLOOR, dtype=dtype).item() == FLOOR
    for best in (-1000.0, 0.0, 1000.0):
        logits = torch.tensor([[best, best - 3, FLOOR]])
        for temperature in (0.07, 1.0, 25.0):
            assert (logits / temperature).softmax(dim=-1)[0, 2] == 0.0
        assert (logits.half() / 0.07).isfinite().all()
        assert kl_divergence(logits, logits - 1e-3 * torch.tensor([1.0, 0, 0])).isfinite().all()


def test_the_head_is_a_matrix_of_its_own_with_their_rows(make_toy: Callable[..., Toy]) -> None:
    toy = make_toy()
    checkpoint = open_checkpoint(toy.folder, head_tokens=TOKENS)
    table = toy.model.state_dict()[EMBEDDING]
    assert checkpoint.spec.weights()[HEAD] == (len(TOKENS), TOY["hidden_size"])
    assert torch.equal(checkpoint.read(HEAD), table[list(TOKENS)])
    assert torch.equal(checkpoint.read(EMBEDDING), table)
    whole = open_checkpoint(toy.folder)
    other = open_checkpoint(toy.folder, head_tokens=(*TOKENS[:-1], 34))
    assert len({one.sha256 for one in (whole, checkpoint, other)}) == 3  # each has codes of its own in the store


def test_slices_and_the_head_by_itself_give_the_same_logits(make_toy: Callable[..., Toy]) -> None:
    graph, reference = pruned(make_toy().folder)
    expected = reference.feed(IDS)
    ids = torch.tensor([IDS])
    assert torch.equal(reference.head(reference.before_head(ids)[0]), expected)
    assert [node.op for node in graph.ending] == ["linear", "spread"]
    *layers, end = in_slices(graph, limit_bytes=1)
    assert [node.op for node in end.nodes] == ["embedding", "rms_norm", "linear", "spread"]
    assert not [node for part in layers for node in part.nodes if node.op == "spread" or node.name == graph.head.name]


def test_quality_is_that_of_the_kept_tokens_alone(make_toy: Callable[..., Toy]) -> None:
    """Against transformers' logits, cut to those tokens and made whole again by softmax."""
    toy = make_toy()
    checkpoint = open_checkpoint(toy.folder, head_tokens=TOKENS)
    graph = trace(checkpoint.spec)
    weights = {name: checkpoint.read(name) for name in checkpoint.spec.weights()}
    lossy = {**weights, HEAD: weights[HEAD] + 0.05 * torch.randn(len(TOKENS), TOY["hidden_size"])}
    found = measure_quality(
        [IDS],
        truth=Reference(graph, weights, FULL_PRECISION),
        candidates={"it": Reference(graph, lossy, FULL_PRECISION)},
        budget_nats=1.0,
        on_layer=lambda: None,
    )["it"].figures
    truth = answer(toy)
    with torch.no_grad():
        hidden = toy.model.model(torch.tensor([IDS])).last_hidden_state[0]
    log_p = truth[:, TOKENS].double().log_softmax(dim=-1)
    log_q = (hidden @ lossy[HEAD].T).double().log_softmax(dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    assert kl.mean() > 1e-3
    assert found["mean_kl_nats"] == pytest.approx(kl.mean().item(), rel=1e-3)
    following = [(at, TOKENS.index(token)) for at, token in enumerate(IDS[1:]) if token in TOKENS]
    nll = -torch.stack([log_p[at, row] for at, row in following])
    assert found["reference_perplexity"] == pytest.approx(nll.mean().exp().item(), rel=1e-4)
    assert found["head_tokens"] == len(TOKENS)


def test_a_text_without_a_kept_token_has_no_perplexity(make_toy: Callable[..., Toy]) -> None:
    _, reference = pruned(make_toy().folder)
    report = measure_quality(
        [[1, 5, 8, 9]], truth=reference, candidates={"it": reference}, budget_nats=1.0, on_layer=lambda: None
    )["it"]
    assert report.figures["mean_kl_nats"] == 0.0
    assert report.figures["perplexity"] is report.figures["reference_perplexity"] is None


def test_the_model_writes_text_to_calibrate_with_by_its_whole_head(
    sample: Path, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def write_windows(graph: Graph, checkpoint: Any, **_: Any) -> Tensor:
        seen.append((graph.spec, checkpoint.spec))
        return torch.zeros(1, 1)

    monkeypatch.setattr("exporter.texts.write_windows", write_windows)
    made = plan(sample, target="onnxruntime", head_tokens=[2041, 5], windows=1, window_length=8)
    checkpoint = open_checkpoint(sample, head_tokens=made.head_tokens)
    texts = read_texts(
        made,
        checkpoint=checkpoint,
        tokenizer=open_tokenizer(sample, cache=made.store),
        graph=trace(checkpoint.spec),
        progress=SILENT,
    )
    assert texts.calibration
    texts.calibration.windows()
    assert seen == [(read_spec(sample), read_spec(sample))]


# --- checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_pruned_already_answers_as_one_that_is_pruned_here(
    tied: bool, make_toy: Callable[..., Toy], tmp_path: Path
) -> None:
    toy = make_toy(tie_word_embeddings=tied)
    folder = write_meta(toy, tmp_path / "meta")
    file = folder / "consolidated.00.pth"
    shard = torch.load(file, weights_only=True)
    shard["output.weight"] = toy.model.state_dict()[HEAD][list(TOKENS)].clone()
    torch.save(shard, file)
    _, reference = pruned(folder)
    got = reference.feed(IDS)
    assert (got[:, TOKENS] - answer(toy)[:, TOKENS]).abs().max() < 1e-4
    assert (got[:, OTHERS] == FLOOR).all()
    with pytest.raises(InputError, match=r"lm_head.weight has shape \[5, 64\], params.json") as error:
        open_checkpoint(folder)
    assert "--head-tokens" in str(error.value.hint)


def test_a_pruned_head_beside_a_config_asks_for_its_tokens(make_toy: Callable[..., Toy]) -> None:
    from safetensors.torch import load_file, save_file

    toy = make_toy(tie_word_embeddings=False)
    file = toy.folder / "model.safetensors"
    tensors = load_file(file)
    tensors[HEAD] = tensors[HEAD][list(TOKENS)].clone()
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"lm_head.weight has shape \[5, 64\]") as error:
        open_checkpoint(toy.folder)
    assert "--head-tokens" in str(error.value.hint)
    _, reference = pruned(toy.folder)
    assert (reference.feed(IDS)[:, TOKENS] - answer(toy)[:, TOKENS]).abs().max() < 1e-4
    with pytest.raises(InputError, match=r"has shape \[5, 64\], config.json wants \[4, 64\]"):
        open_checkpoint(toy.folder, head_tokens=TOKENS[:4])


# --- what is asked for -------------------------------------------------------------------------------------------


def test_a_map_of_executorch_and_a_list_say_the_same(tmp_path: Path) -> None:
    listed, mapped = tmp_path / "list.json", tmp_path / "map.json"
    listed.write_text(json.dumps(TOKENS))
    order = [3, 0, 4, 1, 2]  # of an object, it says nothing
    mapped.write_text(json.dumps({str(row): TOKENS[row] for row in order}))
    assert read_head_tokens(listed) == read_head_tokens(mapped) == list(TOKENS)


BAD_FILES = {
    "[2, 61": "Expecting",
    '"2, 61"': "str without a token in it",
    "[]": "list without a token in it",
    "{}": "list without a token in it",
    "[2, true]": "True is no token id",
    '[2, "61"]': "'61' is no token id",
    '{"0": 2, "2": 61}': "of 2 rows there is no row 1",
    '{"0": 2, "1": 61.0}': "61.0 is no token id",
}


@pytest.mark.parametrize("content", BAD_FILES)
def test_a_bad_file_of_tokens_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(content)
    with pytest.raises(InputError, match=BAD_FILES[content]) as error:
        read_head_tokens(path)
    assert "tokens.json" in str(error.value)
    assert "wanted is a list of token ids" in str(error.value.hint)


BAD_TOKENS = {
    (2, 61, 2): "head token 2 is named twice",
    (2, 96): "head token 96 is outside the vocabulary of 96",
    (2, -1): "head token -1 is outside the vocabulary of 96",
    (61, 7): "no head token ends an answer, one of 2 was expected",
}


@pytest.mark.parametrize("tokens", BAD_TOKENS)
def test_tokens_that_cannot_be_are_refused(tokens: tuple[int, ...], make_toy: Callable[..., Toy]) -> None:
    with pytest.raises(InputError, match=f"--head-tokens: {BAD_TOKENS[tokens]}"):
        plan(make_toy().folder, target="onnxruntime", head_tokens=[*tokens])


def test_every_label_takes_a_pruned_head_or_refuses_it_by_name(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan]
) -> None:
    folder = make_toy().folder
    spec, asked = read_spec(folder, head_tokens=TOKENS), make_plan(folder, precision="fp32")
    for label in targets.LABELS:
        reason = targets.refusal(label, targets.load(label), spec, asked)
        if label not in targets.PRUNED_HEADS:
            assert reason == (
                "it takes no pruned head, --head-tokens; those that do: " + ", ".join(targets.PRUNED_HEADS)
            )
    assert "gguf" not in targets.PRUNED_HEADS


# --- codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [ggufs(Kind.Q8_0), metas_codes()], ids=["tied, of GGUF", "Meta's own"])
def test_rows_of_codes_stay_the_codes_that_they_are(
    write: Callable[[Toy], Written], make_toy: Callable[..., Toy]
) -> None:
    path = write(make_toy()).path
    whole = read_codes(path, read_spec(path))
    spec = read_spec(path, head_tokens=TOKENS)
    head, stored = read_codes(path, spec)[HEAD], whole.get(HEAD) or whole[EMBEDDING]
    assert isinstance(head, LazyCodes)
    assert isinstance(stored, LazyCodes)
    rows, codes, all_codes = list(TOKENS), head.coded(), stored.coded()
    assert torch.equal(codes.codes, all_codes.codes[rows])
    assert torch.equal(codes.scales, all_codes.scales[rows])
    assert torch.equal(head.read(), stored.read()[rows])
    assert head.shape == codes.shape == spec.weights()[HEAD]
    scheme = kept_scheme(path, {}, spec)
    assert scheme
    assert scheme.kept_kind(HEAD) == stored.kind


# --- sizes -------------------------------------------------------------------------------------------------------


def test_what_the_head_of_llama_guard_takes(tmp_path: Path) -> None:
    """Of 128,256 rows of 2,048 int8 codes and a scale, 20 are left: stored twice by executorch, and read anew for each
    token by all."""
    (tmp_path / "config.json").write_text(json.dumps(config_of("Llama Guard 3", "1B")))
    tokens = [128009, *range(19)]

    def sizes(label: str, **choices: Any) -> tuple[int, int]:
        made = plan(tmp_path, target=label, calibration="none", **choices)
        (forecast,) = foresee(made, read_spec(tmp_path, head_tokens=made.head_tokens), None)
        return forecast.footprint.artifact_bytes, forecast.footprint.token_bytes

    for label in ("executorch", "onnxruntime", "coreml"):
        (stored, read), (stored_less, read_less) = sizes(label), sizes(label, head_tokens=tokens)
        row = (read - read_less) / (128256 - 20)
        assert 2048 <= row <= 1.13 * 2048  # ONNX Runtime has a scale for 16 columns, the others have one for a row
        own = read - read_less if label == "executorch" else -20 * row  # the others have one matrix for both, if tied
        assert stored - stored_less == pytest.approx(own)
    assert sizes("coreml", head_tokens=tokens, head="int4")[0] < sizes("coreml", head_tokens=tokens)[0] - 110e6
