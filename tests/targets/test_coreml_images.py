"""What is Core ML's own in a model that sees images: its features, its numbers in float16, and a bound of images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from calibration.layers import quantize
from exporter.checkpoint import open_checkpoint
from exporter.errors import LoweringError
from exporter.model.graph import Program
from exporter.model.trace import trace_program
from exporter.planning import plan as plan_of
from exporter.spec import Artifact
from exporter.store import WeightStore
from targets.base import seeing
from targets.coreml import VISION, CoreMLTarget
from tests.conftest import write_toy
from tests.exporter.test_vision import scene
from tests.generations import toy_config

CONTEXT = 48
STATES = 5
"""Of a tile of the toy."""

pytestmark = pytest.mark.toolchain


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    artifact: Artifact
    program: Program
    store: WeightStore

    @property
    def vision(self) -> Path:
        return self.artifact.path.with_name(VISION)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("seeing")
    toy = write_toy(folder / "toy", **toy_config("Llama 3.2 Vision"))
    checkpoint = open_checkpoint(toy.folder, images=True)
    program = trace_program(checkpoint.spec)
    out = folder / "out"
    out.mkdir()
    choices: dict[str, Any] = {"precision": "int4", "calibration": "none", "context": CONTEXT, "images": True}
    plan = plan_of(toy.folder, target="coreml", out=out, store=folder / "store", **choices)
    store, _ = quantize(checkpoint, plan.scheme, root=plan.store)
    target = seeing(CoreMLTarget())
    artifact = target.lower(program.decoder, store, plan, out)
    assert program.vision is not None
    target.lower_vision(program.vision, store, plan, out)
    return Made(artifact=artifact, program=program, store=store)


def described(path: Path) -> Iterator[tuple[str, str, list[int], list[tuple[int, int]]]]:
    """Name, type, shape and ranges of every feature of a package."""
    from targets.coreml.package import Package
    from targets.coreml.toolchain import Model_pb2

    description = Package(path).description
    types = Model_pb2.ArrayFeatureType.ArrayDataType
    for feature in (*description.input, *description.output):
        array = feature.type.multiArrayType
        ranges = [(size.lowerBound, size.upperBound) for size in array.shapeRange.sizeRanges]
        yield feature.name, types.Name(array.dataType), [*array.shape], ranges


def test_features_are_as_they_are_told_to_an_app(made: Made) -> None:
    decoder = {name: rest for name, *rest in described(made.artifact.path)}
    tiles, length = (1, 16), (1, CONTEXT)
    assert decoder["crossAttentionMask"] == ["FLOAT16", [1, 1, 1], [(1, 1), length, tiles]]
    states = ["FLOAT16", [2, 1, STATES, 16], [(2, 2), tiles, (STATES, STATES), (16, 16)]]
    names = [f"image{kind}_{index}" for kind in ("Key", "Value") for index in (0, 1)]
    assert {name: decoder[name] for name in names} == dict.fromkeys(names, states)
    assert decoder.keys() == {"inputIds", "causalMask", "crossAttentionMask", "logits", *names}
    vision = {name: rest for name, *rest in described(made.vision)}
    given = {
        "pixelValues": ["FLOAT16", [1, 4, 3, 28, 28], []],
        "aspectRatioIds": ["INT32", [1, 1], []],
        "aspectRatioMask": ["INT32", [1, 1, 4], []],
    }
    assert {name: vision.pop(name) for name in given} == given
    assert vision.keys() == set(names)
    assert {rest[0] for rest in vision.values()} == {"FLOAT16"}


@pytest.mark.parametrize("tiles", [1, 3])
def test_nothing_leaves_the_range_of_float16(made: Made, tiles: int) -> None:
    """Every value of both programs: padding is masked by numbers, no infinity is there but in the app's own mask."""
    from targets.coreml.evaluate import Evaluator, Rounding
    from targets.coreml.images import image_features
    from targets.coreml.package import Package
    from targets.coreml.runner import causal_mask

    shown = scene(tiles)
    given = {
        made.vision: image_features(shown.image(0)),
        made.artifact.path: {
            "inputIds": shown.ids.int(),
            "causalMask": causal_mask(0, 30).float(),
            "crossAttentionMask": shown.tiles[None].float(),
        },
    }
    for path, features in given.items():
        computed = [one for one in Package(path).operations if one.type not in ("const", "write_state", "read_state")]
        watched = {o.outputs[0].name: o for o in computed if not o.type.startswith("constexpr")}
        values = Evaluator(path, rounding=Rounding.FP16)(features, watched=watched)
        for name, operation in watched.items():
            told_by_app = operation.type == "tile" and values[name].shape[-1] == 30
            assert told_by_app or values[name].isfinite().all(), (name, operation.type)
        given[made.artifact.path] |= {name: values[name] for name in Package(path).outputs}


def test_nothing_is_added_to_the_scores_of_a_token_that_sees_no_tile(made: Made) -> None:
    """It looks at all of them: the same number for each would be as good, but for what float16 leaves of a score."""
    from targets.coreml.evaluate import Evaluator, Rounding
    from targets.coreml.package import Package
    from targets.coreml.runner import causal_mask

    tiles = scene(3).tiles
    features = {
        "inputIds": torch.tensor([[5] * 30], dtype=torch.int32),
        "causalMask": causal_mask(0, 30).float(),
        "crossAttentionMask": tiles[None].float(),
        **{f"image{kind}_{index}": torch.zeros(2, 4, STATES, 16) for kind in ("Key", "Value") for index in (0, 1)},
    }
    attentions = [o for o in Package(made.artifact.path).operations if o.type == "scaled_dot_product_attention"]
    masks = [attention.inputs["attn_mask"].arguments[0].name for attention in attentions]
    values = Evaluator(made.artifact.path, rounding=Rounding.FP16)(features, watched=masks)
    (mask,) = (values[name] for name in set(masks) if values[name].shape[-1] == 4 * STATES)
    heads = mask.view(2, 30, 4, STATES)  # the queries that share a key, one behind the other
    wanted = torch.where(tiles | ~tiles.any(dim=1, keepdim=True), 0.0, -3e4)
    assert torch.equal(heads, wanted[None, ..., None].expand_as(heads))


def test_core_ml_is_given_what_both_packages_declare(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Mac, but for ``MLModel``: in its place stands the evaluator, behind the same calls."""
    from targets.coreml import runner as module
    from targets.coreml.evaluate import Evaluator, Rounding

    given: dict[str, tuple[object, dict[str, str]]] = {}

    class Model:
        def __init__(self, path: str, *, compute_units: object) -> None:
            self._name, self._evaluate = Path(path).name, Evaluator(Path(path), rounding=Rounding.FP16)

        def make_state(self) -> object:
            return "a state"

        def predict(self, inputs: dict[str, Any], *, state: object) -> dict[str, Any]:
            given[self._name] = state, {name: str(array.dtype) for name, array in inputs.items()}
            tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
            found = self._evaluate({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})
            return {name: value.half().numpy() for name, value in found.items()}

    shown, target = scene(3), CoreMLTarget()
    ids = shown.ids[0].tolist()
    with target.open_seeing(made.artifact, threads=1, rounding=True) as runner:
        runner.look(shown.image(0))
        wanted = runner.feed(ids, tiles=shown.tiles)
    stand_in = SimpleNamespace(models=SimpleNamespace(MLModel=Model), ComputeUnit=module.ct.ComputeUnit)
    monkeypatch.setattr("targets.coreml.executes_here", lambda: True)
    monkeypatch.setattr(module, "ct", stand_in)
    with target.open_seeing(made.artifact, threads=1, rounding=True) as runner:
        runner.look(shown.image(0))
        assert torch.equal(runner.feed(ids, tiles=shown.tiles), wanted)
    for path, state in ((made.artifact.path, "a state"), (made.vision, None)):
        inputs = {name: kind.lower() for name, kind, *_ in described(path)}
        assert given[path.name][0] == state
        assert given[path.name][1].items() <= inputs.items()


def test_cross_attention_of_another_scale_is_refused() -> None:
    from targets.coreml.emission import refuse_unknown_attention

    with pytest.raises(LoweringError, match=r"cannot lower op 'cross_attention': scale is 1, only 0\.25 works"):
        refuse_unknown_attention(16, scale=1.0, window=0, chunk=0, layer=None)
