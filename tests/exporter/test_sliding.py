"""A context that slides: what is left, that it is a text of its own, and that a conversation goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from exporter.checkpoint import open_checkpoint
from exporter.cli import app
from exporter.errors import UsageError
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace
from exporter.sliding import Sliding, SlidingRunner, sliding_asked
from tests.conftest import Toy

CONTEXT = 12


class Listening:
    """A runner that keeps what it is told, and never more than its context."""

    def __init__(self) -> None:
        self.cache: list[int] = []

    def feed(self, ids: Any) -> torch.Tensor:
        self.cache += ids
        assert len(self.cache) <= CONTEXT
        return torch.zeros(1, 1)

    def rewind(self, position: int) -> None:
        assert position <= len(self.cache)
        del self.cache[position:]


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=20), min_size=1, max_size=12),
    st.integers(0, 4),
    st.integers(1, 7),
)
def test_the_cache_holds_the_first_tokens_and_the_last(texts: list[list[int]], sink: int, window: int) -> None:
    listening = Listening()
    runner = SlidingRunner(listening, Sliding(sink=sink, window=window), context=CONTEXT)
    said: list[int] = []
    for ids in texts:
        runner.feed(ids)
        said += ids
        assert listening.cache == runner.held
        assert listening.cache[:sink] == said[:sink]
        recent = len(listening.cache) - min(sink, len(listening.cache))
        assert recent >= min(window, len(said) - sink)
        assert said[len(said) - recent :] == listening.cache[len(listening.cache) - recent :]


def test_after_a_slide_the_model_sees_what_is_left_as_a_text_of_its_own(make_toy: Callable[..., Toy]) -> None:
    checkpoint = open_checkpoint(make_toy().folder)
    graph = trace(checkpoint.spec)
    weights = {name: checkpoint.read(name) for name in checkpoint.spec.weights()}
    runner = SlidingRunner(Reference(graph, weights, FULL_PRECISION), Sliding(sink=2, window=5), context=CONTEXT)
    ids = torch.randint(0, 64, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    slid = 0
    for token in ids:
        before = len(runner.held)
        logits = runner.feed([token])[-1]
        slid += len(runner.held) <= before
        anew = Reference(graph, weights, FULL_PRECISION).feed(runner.held)[-1]
        torch.testing.assert_close(logits, anew, rtol=0, atol=2e-5)
        assert runner.held[-1] == token
    assert slid == 5  # at tokens 13, 19, 25, 31 and 37: seven are left, and five more fit


@pytest.mark.parametrize(
    ("sink", "window", "says"),
    [
        (4, 8, "--sink 4 and --sliding-window 8 fill the context of 12"),
        (-1, 4, "--sink is -1 and --sliding-window 4, at least 0 and 1 were expected"),
        (0, 0, "--sink is 0 and --sliding-window 0, at least 0 and 1 were expected"),
    ],
)
def test_a_slide_that_leaves_no_room_is_refused(sink: int, window: int, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        Sliding(sink=sink, window=window).check(context=CONTEXT)
    assert str(caught.value) == says


def test_a_window_alone_keeps_four_tokens_as_well() -> None:
    assert sliding_asked(sink=None, window=40) == Sliding(sink=4, window=40)
    assert sliding_asked(sink=0, window=40) == Sliding(sink=0, window=40)
    assert sliding_asked(sink=None, window=None) is None


@pytest.mark.parametrize("words", [["generate", "bundle", "So"], ["chat", "bundle"]])
@pytest.mark.parametrize("sink", ["0", "4"])
def test_a_sink_without_a_window_is_refused(words: list[str], sink: str) -> None:
    result = CliRunner().invoke(app, [*words, "--sink", sink])
    assert result.exit_code == 2
    assert "--sink goes with --sliding-window" in result.stderr
    assert "Traceback" not in result.output


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sliding")
    words = ["-t", "onnxruntime", "-c", "64", "--calibration", "none", "--threads", "1"]
    result = CliRunner().invoke(app, [*words, "-o", str(folder / "out"), "--store", str(folder / "store")])
    assert result.exit_code == 0, result.output
    return folder / "out" / "onnxruntime"


def generate(bundle: Path, *words: str) -> dict[str, Any]:
    prompt = ["The people of the United States", "--max-tokens", "120"]
    result = CliRunner().invoke(app, ["generate", str(bundle), *prompt, *words, "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.toolchain
def test_an_answer_goes_on_where_the_context_is_full(bundle: Path) -> None:
    ended, went_on = generate(bundle), generate(bundle, "--sliding-window", "40")
    assert (ended["ended"], went_on["ended"]) == ("context", "length")
    assert len(went_on["ids"]) == 120
    assert went_on["ids"][: len(ended["ids"])] == ended["ids"]


@pytest.mark.toolchain
def test_a_prompt_that_is_too_long_keeps_its_ends(bundle: Path) -> None:
    words = ["generate", str(bundle), "a long way " * 60, "--max-tokens", "4", "--json"]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 3
    assert "say --sliding-window" in refused.stderr
    found = json.loads(CliRunner().invoke(app, [*words, "--sliding-window", "40"]).stdout)
    assert found["prompt_tokens"] == 44
    assert len(found["ids"]) == 4


@pytest.mark.toolchain
def test_a_window_as_wide_as_the_context_is_refused(bundle: Path) -> None:
    result = CliRunner().invoke(app, ["generate", str(bundle), "So", "--sliding-window", "60"])
    assert result.exit_code == 2
    assert "--sink 4 and --sliding-window 60 fill the context of 64" in result.stderr
