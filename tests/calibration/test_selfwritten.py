"""Text that the model writes itself: drawn from the model's own distribution, from starts that all differ."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from calibration.selfwritten import write_windows
from exporter.checkpoint import open_checkpoint
from exporter.checkpoint.config import read_spec
from exporter.errors import InputError, UsageError
from exporter.model.graph import Graph
from exporter.model.trace import trace
from exporter.spec import EMBEDDING, ModelSpec
from exporter.tokenizer import Tokenizer
from tests.conftest import Toy, write_toy

VOCABULARY = 96
BEGIN, END = 1, 2


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small lose more by waiting for a second thread than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Random, with Llama 3's frequencies, and sharp enough that a wrong distribution shows."""
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    return write_toy(tmp_path_factory.mktemp("toy") / "toy", rope_parameters=rope)


@pytest.fixture(scope="module")
def graph(toy: Toy) -> Graph:
    return trace(read_spec(toy.folder))


@pytest.fixture(scope="module")
def weights(toy: Toy) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(toy.folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def write(graph: Graph, weights: dict[str, Tensor], **changes: Any) -> Tensor:
    defaults: dict[str, Any] = {"windows": 8, "length": 24, "seed": 0, "excluded": {0, BEGIN, END}}
    return write_windows(graph, weights, **{**defaults, **changes})


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The logits ``[W, 1, V]`` of every step."""
    steps: list[Tensor] = []
    run = Graph.run

    def watched(self: Graph, *arguments: Any) -> dict[str, Any]:
        outputs = run(self, *arguments)
        steps.append(outputs["logits"])
        return outputs

    monkeypatch.setattr(Graph, "run", watched)
    return steps


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**40), windows=st.integers(1, 40), length=st.integers(1, 12))
def test_every_window_has_a_start_of_its_own(
    graph: Graph, weights: dict[str, Tensor], seed: int, windows: int, length: int
) -> None:
    excluded = {0, BEGIN, END, 50, 51}
    written = write(graph, weights, windows=windows, length=length, seed=seed, excluded=excluded)
    assert written.shape == (windows, length)
    assert written.dtype == torch.int64
    assert (written[:, 0] == BEGIN).all()
    if length > 1:
        starts = written[:, 1].tolist()
        assert len(set(starts)) == windows
        assert not set(starts) & excluded
        assert len(written.unique(dim=0)) == windows


def test_the_same_seed_writes_the_same_text_and_another_seed_another(graph: Graph, weights: dict[str, Tensor]) -> None:
    first, again, other = (write(graph, weights, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_random_numbers_of_others_are_left_alone(graph: Graph, weights: dict[str, Tensor]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    write(graph, weights)
    assert torch.equal(torch.rand(3), expected)


def test_logits_are_those_of_transformers_for_every_row_and_position(
    toy: Toy, graph: Graph, weights: dict[str, Tensor], seen: list[Tensor]
) -> None:
    written = write(graph, weights, length=40)
    with torch.no_grad():
        expected = toy.model(written).logits
    assert torch.allclose(torch.cat(seen, dim=1), expected[:, : len(seen)], atol=1e-4)
    assert len(seen) >= 39  # what follows the last token is nobody's concern


def test_tokens_are_drawn_at_temperature_one(toy: Toy, graph: Graph, weights: dict[str, Tensor]) -> None:
    """By transformers' account the surprise of a drawn token is on average the entropy of what it was drawn from.

    The mean of n independent terms (surprise - entropy) has a standard error of std / sqrt(n). Hotter or colder
    sampling shows: at a temperature of 0.9 this toy is eleven of them off.
    """
    written = write(graph, weights, windows=90, length=60)
    with torch.no_grad():
        log_probabilities = toy.model(written).logits.log_softmax(dim=-1)[:, 1:-1].double()
    surprise = -log_probabilities.gather(2, written[:, 2:, None]).squeeze(2)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
    drawn = torch.ones_like(surprise, dtype=torch.bool)
    for row, column in (written[:, :-1] == END).nonzero().tolist():
        drawn[row, max(0, column - 1) : column + 1] = False  # a begin token and a start were put there
    terms = (surprise - entropy)[drawn]
    assert len(terms) > 4000
    assert abs(terms.mean()) < 4 * terms.std() / len(terms) ** 0.5


def always_ending(spec: ModelSpec) -> dict[str, Tensor]:
    """Weights of a model that says END whatever it was told: the layers add nothing, every embedding starts with the
    same number, and the head of END alone listens to it."""
    weights = {name: torch.zeros(shape) for name, shape in spec.weights().items()}
    for name in weights:
        if "norm" in name:
            weights[name] += 1
    weights[EMBEDDING][:, 0] = 1
    weights["lm_head.weight"][END, 0] = 100
    return weights


@pytest.mark.parametrize("begin", [BEGIN, None])
def test_an_end_is_followed_by_another_start(graph: Graph, begin: int | None) -> None:
    spec = replace(graph.spec, tie_word_embeddings=False, bos_token_id=begin)
    head = [] if begin is None else [begin]
    written = write(trace(spec), always_ending(spec), windows=9, length=24)
    text_length = len(head) + 2
    for row in written.tolist():
        texts = [row[start : start + text_length] for start in range(0, 24, text_length)]
        assert all(text == [*head, text[len(head)], END][: len(text)] for text in texts)
    starts = written[:, len(head) :: text_length].flatten().tolist()
    assert not set(starts) & {0, BEGIN, END}
    if begin is not None:
        assert len(set(starts)) == len(starts) == 72  # 93 tokens can start, so that none need come twice


def test_starts_are_used_again_when_all_were_used(graph: Graph) -> None:
    spec = replace(graph.spec, tie_word_embeddings=False)
    written = write(trace(spec), always_ending(spec), windows=90, length=24)
    starts = written[:, 1::3].flatten().tolist()
    assert len(starts) == 720
    assert set(starts) == set(range(3, VOCABULARY))


def test_no_float32_copy_of_a_weight_is_made(graph: Graph, weights: dict[str, Tensor]) -> None:
    matrices = {tuple(weight.shape) for weight in weights.values() if weight.dim() == 2}
    matrices |= {(columns, rows) for rows, columns in matrices}
    made: list[tuple[int, ...]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dtype == torch.float32:
                made.append(tuple(result.shape))
            return result

    with Watch():
        write(graph, {name: weight.bfloat16() for name, weight in weights.items()}, windows=5, length=7)
    assert made
    assert not set(made) & matrices


def test_bfloat16_weights_write_text_of_the_same_model(toy: Toy, graph: Graph, weights: dict[str, Tensor]) -> None:
    """Near enough to it: less surprise to the float32 model than text of a uniform distribution, by far."""
    written = write(graph, {name: weight.bfloat16() for name, weight in weights.items()}, windows=60, length=40)
    with torch.no_grad():
        log_probabilities = toy.model(written).logits.log_softmax(dim=-1)[:, 1:-1]
    surprise = -log_probabilities.gather(2, written[:, 2:, None]).mean()
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean()
    uniform = -log_probabilities.mean()
    assert abs(surprise - entropy) < 0.1 * (uniform - entropy)


def test_every_step_is_told(graph: Graph, weights: dict[str, Tensor]) -> None:
    steps: list[tuple[int, int]] = []
    write(graph, weights, length=5, on_step=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_more_windows_than_starts_are_refused(graph: Graph, weights: dict[str, Tensor]) -> None:
    with pytest.raises(UsageError) as caught:
        write(graph, weights, windows=94)
    assert str(caught.value) == "--windows 94 is more than the 93 tokens that a text of this model can start with"
    assert caught.value.hint == "take --windows 93 or less, or name a corpus"
    assert write(graph, weights, windows=93, length=2).shape == (93, 2)


def test_begin_and_end_never_start_a_text(graph: Graph, weights: dict[str, Tensor]) -> None:
    starts = write(graph, weights, windows=94, length=2, excluded=())[:, 1].tolist()
    assert set(starts) == set(range(VOCABULARY)) - {BEGIN, END}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(graph: Graph, weights: dict[str, Tensor], value: float) -> None:
    broken = dict(weights)
    broken["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], value)
    with pytest.raises(InputError) as caught:
        write(graph, broken)
    assert str(caught.value) == "the model's logits are not finite, so that it cannot write a text to calibrate with"
    assert caught.value.hint == "check the checkpoint: it may have been cut off, or have diverged in training"


@pytest.mark.parametrize("limit", [{"window": 5}, {"chunk": 6}])
def test_attention_sees_as_far_as_the_op_of_the_graph(
    graph: Graph, weights: dict[str, Tensor], limit: dict[str, int], seen: list[Tensor]
) -> None:
    """A graph with a window or with chunks, which no Llama of today has, against the op's own definition."""
    from exporter.model.reference import FULL_PRECISION, Reference

    def limited(node: Any) -> Any:
        if node.op != "attention":
            return node
        *rest, window, chunk = node.arguments
        return replace(node, arguments=(*rest, limit.get("window", window), limit.get("chunk", chunk)))

    other = replace(graph, nodes=tuple(limited(node) for node in graph.nodes))
    written = write(other, weights, windows=2, length=20)
    logits = torch.cat(seen, dim=1)
    for row, ids in enumerate(written.tolist()):
        expected = Reference(other, weights, FULL_PRECISION).feed(ids)
        assert torch.allclose(logits[row], expected[: logits.shape[1]], atol=1e-4)
        assert not torch.allclose(Reference(graph, weights, FULL_PRECISION).feed(ids), expected, atol=1e-2)


def test_the_sample_starts_no_text_with_a_special_token(sample: Path) -> None:
    added = json.loads((sample / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    special = {token["id"] for token in added if token["special"]}
    assert Tokenizer(sample).special_ids == special
    checkpoint = open_checkpoint(sample)
    weights = {name: checkpoint.read(name) for name in checkpoint.tensors}
    windows = checkpoint.spec.vocab_size - len(special)
    written = write(trace(checkpoint.spec), weights, windows=windows, length=3, excluded=Tokenizer(sample).special_ids)
    assert set(written[:, 1].tolist()) == set(range(checkpoint.spec.vocab_size)) - special
