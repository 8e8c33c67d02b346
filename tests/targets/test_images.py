"""Both graphs of a model that sees images, in every target that takes them: what they compute, and what is proven."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import targets
from calibration.layers import quantize
from exporter.checkpoint import open_checkpoint
from exporter.codes import check_codes, weight_digests
from exporter.errors import InputError
from exporter.images import prove_images
from exporter.model.graph import Program
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace_program
from exporter.parity import drive_for
from exporter.planning import plan as plan_of
from exporter.spec import Artifact, Plan, Report, Verdict
from exporter.store import StoredWeight, WeightStore
from targets import coreml, executorch
from targets.base import SeeingTarget, seeing
from tests.conftest import write_toy
from tests.exporter.test_vision import scene
from tests.generations import toy_config

CONTEXT = 48
IDS = torch.randint(3, 96, (CONTEXT,), generator=torch.Generator().manual_seed(4)).tolist()

pytestmark = pytest.mark.toolchain


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """Both graphs of the toy in float32, lowered, and all that they were made from."""

    target: SeeingTarget
    artifact: Artifact
    program: Program
    store: WeightStore
    plan: Plan

    def prove(self, artifact: Artifact) -> Report:
        material: dict[str, Any] = {"program": self.program, "store": self.store, "plan": self.plan}
        return prove_images(self.target, artifact, **material, steps=drive_for(IDS, context=CONTEXT))

    def codes(self, artifact: Artifact) -> Report:
        found, expected = self.target.read_weights(artifact), weight_digests(self.store)
        return check_codes(found, expected=expected, scheme=self.plan.scheme)


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Lowered]:
    """The toy in the target of that label; lowered once."""
    folder = tmp_path_factory.mktemp("seeing")
    toy = write_toy(folder / "toy", **toy_config("Llama 3.2 Vision"))
    checkpoint = open_checkpoint(toy.folder, images=True)
    program = trace_program(checkpoint.spec)
    made: dict[str, Lowered] = {}

    def lower(label: str) -> Lowered:
        if label not in made:
            out, target = folder / label, seeing(targets.load(label))
            out.mkdir()
            choices: dict[str, Any] = {"precision": "fp32", "calibration": "none", "context": CONTEXT, "images": True}
            plan = plan_of(toy.folder, target=label, out=out, store=folder / "store", **choices)
            store, _ = quantize(checkpoint, plan.scheme, root=plan.store)
            artifact = target.lower(program.decoder, store, plan, out)
            assert program.vision is not None
            target.lower_vision(program.vision, store, plan, out)
            made[label] = Lowered(target=target, artifact=artifact, program=program, store=store, plan=plan)
        return made[label]

    return lower


class Changed:
    """A store in which one weight is not what it was."""

    def __init__(self, store: WeightStore, name: str) -> None:
        self._store, self._name = store, name

    def __getitem__(self, name: str) -> StoredWeight:
        stored = self._store[name]
        assert isinstance(stored, Tensor)  # in float32
        return stored * 1.1 if name == self._name else stored

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def rounds(label: str) -> bool:
    """Whether an artifact of float32 is run as it ships: what Core ML keeps of a text or an image is float16 in any."""
    return label != "coreml"


@pytest.mark.parametrize("label", targets.SEEING)
def test_what_is_lowered_sees_what_the_reference_sees(lowered: Callable[[str], Lowered], label: str) -> None:
    """Two images, of which each token sees those before it; without the rounding to float16 of who computes in it."""
    made, shown = lowered(label), scene(2, 3)
    vision, ids = made.program.vision, shown.ids[0].tolist()
    assert vision is not None
    reference = Reference(made.program.decoder, made.store, FULL_PRECISION)
    with made.target.open_seeing(made.artifact, threads=1, rounding=False) as runner:
        for index in range(2):
            expected = reference.look(vision, shown.image(index))
            found = runner.look(shown.image(index))
            assert found.keys() == expected.keys()
            assert all((found[name] - expected[name]).abs().max() < 1e-4 for name in expected)
        for span in (slice(0, 18), slice(18, 19), slice(19, 30)):
            wanted = reference.feed(ids[span], tiles=shown.tiles[span])
            got = runner.feed(ids[span], tiles=shown.tiles[span])
            assert (got[-1] - wanted[-1]).abs().max() < 1e-4


@pytest.mark.parametrize("label", targets.SEEING)
def test_a_decoder_that_is_shown_no_image_is_the_text_alone(
    lowered: Callable[[str], Lowered], label: str, tmp_path: Path
) -> None:
    made = lowered(label)
    plan = replace(made.plan, images=False)
    alone = made.target.lower(made.program.text, made.store, plan, tmp_path)
    with (
        made.target.open(alone, threads=1) as text,
        made.target.open(made.artifact, threads=1) as decoder,
    ):
        for call in (IDS[:17], IDS[17:18], IDS[18:30]):
            assert torch.equal(decoder.feed(call), text.feed(call))


@pytest.mark.parametrize("label", targets.SEEING)
def test_codes_and_images_pass(lowered: Callable[[str], Lowered], label: str) -> None:
    made = lowered(label)
    assert made.codes(made.artifact).verdict is Verdict.PASSED
    report = made.prove(made.artifact)
    assert report.verdict is Verdict.PASSED, report
    assert report.figures["structure_max_abs_logit_diff"] < 1e-4


@pytest.mark.parametrize("label", targets.SEEING)
@pytest.mark.parametrize(
    "name", ["vision_model.class_embedding", "vision_model.global_transformer.layers.1.mlp.fc2.bias"]
)
def test_a_wrong_weight_of_the_vision_graph_fails_both(
    lowered: Callable[[str], Lowered], label: str, name: str, tmp_path: Path
) -> None:
    made = lowered(label)
    assert made.program.vision is not None
    shutil.copytree(made.artifact.path.parent, tmp_path, dirs_exist_ok=True)
    changed: Any = Changed(made.store, name)
    made.target.lower_vision(made.program.vision, changed, made.plan, tmp_path)
    wrong = replace(made.artifact, path=tmp_path / made.artifact.path.name)
    codes = made.codes(wrong)
    assert (codes.verdict, codes.figures["wrong"]) == (Verdict.FAILED, [name])
    assert made.prove(wrong).verdict is Verdict.FAILED


@pytest.mark.parametrize(("label", "most"), [("executorch", executorch.MOST_IMAGES), ("coreml", coreml.MOST_IMAGES)])
def test_a_program_of_bounded_lengths_takes_so_many_images_and_no_more(
    lowered: Callable[[str], Lowered], label: str, most: int
) -> None:
    made, shown = lowered(label), scene(3)
    reference = Reference(made.program.decoder, made.store, FULL_PRECISION)
    assert made.program.vision is not None
    ids, tiles = shown.ids[0].tolist(), shown.tiles.repeat(1, most)
    with made.target.open_seeing(made.artifact, threads=1, rounding=rounds(label)) as runner:
        for _ in range(most):
            runner.look(shown.image(0))
            reference.look(made.program.vision, shown.image(0))
        wanted = reference.feed(ids, tiles=tiles)
        assert (runner.feed(ids, tiles=tiles)[-1] - wanted[-1]).abs().max() < 1e-4
        with pytest.raises(InputError, match=f"{most} images were shown, the program takes {most}"):
            runner.look(shown.image(0))
