"""What a target promises. Its toolchain is imported only inside its own folder, when it is used."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol, Self, runtime_checkable

from torch import Tensor

from exporter.errors import InputError
from exporter.model.graph import Graph, Value
from exporter.spec import Arithmetic, Artifact, ModelSpec, Plan, Prefer, Report, WeightScheme
from exporter.store import StoredWeight, WeightStore
from targets import INT8_CACHES, label


class Runner(Protocol):
    """One loaded artifact with one key-value cache. Close it when done, or open it in a ``with``."""

    load_s: float
    """Seconds it took to load the artifact."""
    steps_s: Sequence[float]
    """Seconds the runtime took for the last ``feed``, or for each step of the last ``feed_each``, without what it takes
    to reach it."""

    @property
    def position(self) -> int:
        """Tokens in the cache; the next one fed has this position."""
        ...

    def feed(self, ids: Sequence[int]) -> Tensor:
        """Append any number of tokens to the cache; float32 logits ``[1, V]`` after the last of them, or ``[T, V]``
        from an artifact made with ``Logits.ALL``. Raises InputError when the context would be exceeded."""
        ...

    def feed_each(self, ids: Sequence[int]) -> Tensor:
        """``feed`` the tokens one at a time, as decoding does, with nothing in between; logits after the last."""
        ...

    def rewind(self, position: int) -> None:
        """Forget every token from ``position`` on (0: start anew). Raises InputError beyond the current position."""
        ...

    def close(self) -> None: ...


class SeeingRunner(Runner, Protocol):
    """One whose model sees images."""

    def look(self, image: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Show an image, behind those shown before: the inputs of the vision graph by name; where that reads one tile
        at a time, of all tiles. What the decoder takes from it, by the names of that graph's outputs."""
        ...

    def feed(self, ids: Sequence[int], *, tiles: Tensor | None = None) -> Tensor:
        """``tiles`` bool ``[T, M]``: of all images shown, those tiles that each token sees; None: it sees none. Where
        states of tiles stand in the place of tokens (``FusionSpec``), M are these states, and a token sees the one that
        stands in its place, or none."""
        ...


class BaseRunner(Runner):
    """A runner that never looks at what lies in the cache beyond its position, so that rewinding is a matter of the
    position alone. A subclass sets ``load_s``, and with each ``feed`` moves the position and sets ``steps_s``."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._position = 0
        self.steps_s: Sequence[float] = ()

    @property
    def position(self) -> int:
        return self._position

    @abstractmethod
    def feed(self, ids: Sequence[int]) -> Tensor: ...

    def feed_each(self, ids: Sequence[int]) -> Tensor:
        """For a runner that lives in this process."""
        steps_s: list[float] = []
        for token in ids:
            logits = self.feed([token])
            steps_s += self.steps_s
        self.steps_s = steps_s
        return logits

    def rewind(self, position: int) -> None:
        if not 0 <= position <= self._position:
            raise InputError(
                f"cannot rewind to position {position}: the cache holds {self._position} tokens",
                hint="rewind to a position that has been fed",
            )
        self._position = position

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_feed(self, ids: Sequence[int]) -> None:
        """Raises InputError for tokens that do not fit the rest of the cache, or are none of the vocabulary."""
        artifact = self._artifact
        if not ids or self._position + len(ids) > artifact.context:
            raise InputError(
                f"{len(ids)} tokens at position {self._position} do not fit a context of {artifact.context}",
                hint="feed between 1 and the room that is left, rewind, or export with a larger --context",
            )
        strange = [token for token in ids if not 0 <= token < artifact.spec.num_embeddings]
        if strange:
            raise InputError(
                f"token {strange[0]} is outside the vocabulary of {artifact.spec.num_embeddings}",
                hint="tokenize with the tokenizer of this model",
            )


def arithmetic_for(target: Target, plan: Plan) -> Arithmetic:
    """What the runtime does with numbers in an artifact of this plan."""
    arithmetic = target.arithmetic(plan.scheme, plan.prefer)
    if not plan.kv_cache:
        return arithmetic
    return replace(arithmetic, kv_dtype=INT8_CACHES[label(target.name, target.backend)])


def make_artifact(target: Target, *, spec: ModelSpec, plan: Plan, path: Path) -> Artifact:
    """What ``target`` has written at ``path`` for ``plan``, for its backend."""
    return Artifact(
        target=target.name,
        backend=target.backend,
        path=path,
        spec=spec,
        scheme=plan.scheme,
        arithmetic=arithmetic_for(target, plan),
        context=plan.context,
        logits=plan.logits,
        prefer=plan.prefer,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What an artifact's file computed inside, as far as our graph has a name for it."""

    arithmetic: Arithmetic
    """How it was computed; a reference that is to agree computes the same way."""
    calls: Sequence[Mapping[Value, Tensor]]
    """The values of each call, float32; one that has no counterpart in the file is absent. Calls end early where the
    file cannot go on with the cache that it has left."""


class Target(Protocol):
    """One toolchain that turns a graph and its weights into a file, for one backend that runs it on a device."""

    name: ClassVar[str]
    backend: str
    format: ClassVar[str]  # file suffix and what it is, for `llama-export targets`

    def missing(self) -> str | None:
        """The package or SDK that this host lacks to lower or to run, and the command that installs it, in one
        sentence; None if nothing is missing. Imports no toolchain."""
        ...

    def cannot_execute(self) -> str | None:
        """Why this host cannot run what is lowered, in one sentence; None if it can. Nothing then is opened, and
        ``audit`` takes the place of parity."""
        ...

    def audit(self, artifact: Artifact) -> Report | None:
        """What the structure of an artifact shows that this host cannot run: delegates, ops left over, constants. None
        of one that is run."""
        ...

    def refuse(self, spec: ModelSpec, plan: Plan) -> str | None:
        """Why this plan cannot work, in one sentence; None if it can. Reads no weight, imports no toolchain."""
        ...

    def arithmetic(self, scheme: WeightScheme, prefer: Prefer = Prefer.QUALITY) -> Arithmetic:
        """What the artifact's runtime does with numbers under that scheme: the reference will do the same."""
        ...

    def lower(self, graph: Graph, store: WeightStore, plan: Plan, out: Path) -> Artifact:
        """Write one artifact under ``out``. Raises MissingToolError or LoweringError; leaves no half file."""
        ...

    def find(self, bundle: Path) -> Path:
        """Where the artifact lies in a bundle folder."""
        ...

    def read_weights(self, artifact: Artifact) -> Iterator[tuple[str, StoredWeight]]:
        """Every weight as it lies in the artifact's file, for the codes verdict; a weight stored twice comes twice.
        Codes may come in finer groups than the store's (one scale repeated)."""
        ...

    def runtime(self) -> str:
        """What ``open`` executes the artifact with on this host, with its version."""
        ...

    def open(self, artifact: Artifact, *, threads: int) -> AbstractContextManager[Runner]:
        """Load the artifact on this host. Raises HostError where this host cannot execute it."""
        ...

    def on(self, compute_units: str) -> Target:
        """The same target, whose artifacts ``open`` runs on these processors of this host. Raises UsageError where
        nothing can be chosen."""
        ...

    def is_slow(self, spec: ModelSpec) -> bool:
        """Whether what ``open`` gives takes seconds for each token on this host, so that proofs decode few."""
        ...

    def structure_parts(self, graph: Graph, scheme: WeightScheme) -> Sequence[Graph]:
        """The graphs that ``open_structure`` is to be asked for, one after the other: ``graph`` itself, or shorter
        models that cover it (``exporter.model.graph.in_slices``) where its weights in float32 would be too much."""
        ...

    def open_structure(
        self, artifact: Artifact, *, graph: Graph, store: WeightStore, plan: Plan, scratch: Path
    ) -> AbstractContextManager[Runner]:
        """The same lowering with activations left unquantized (and fp32 arithmetic), for the strict half of parity, of
        one of the ``structure_parts``. ``scratch`` is an empty folder for whatever has to be written."""
        ...

    def latency_unmeasurable(self) -> str | None:
        """Why latency cannot be measured on this host, in one sentence; None if it can."""
        ...

    def observe(self, artifact: Artifact, *, graph: Graph, calls: Sequence[Sequence[int]], threads: int) -> Observation:
        """Run the artifact's file with its inner values open, for ``validate --bisect``: each of ``calls`` feeds token
        ids, the first to an empty cache."""
        ...


@runtime_checkable
class SeeingTarget(Target, Protocol):
    """One that takes a model that sees images; ``lower`` is given its decoder."""

    def lower_vision(self, graph: Graph, store: WeightStore, plan: Plan, out: Path) -> None:
        """Write the vision graph beside the artifact of the decoder. Raises as ``lower``."""
        ...

    def open_seeing(self, artifact: Artifact, *, threads: int, rounding: bool) -> AbstractContextManager[SeeingRunner]:
        """As ``open``; without ``rounding`` as ``open_structure``."""
        ...


@runtime_checkable
class RemarkingTarget(Target, Protocol):
    """One whose runtime does something otherwise than the model, where nothing of ours can help it."""

    def remarks(self, artifact: Artifact) -> list[str]:
        """A sentence for each such thing that the artifact has."""
        ...


def remarks_of(target: Target, artifact: Artifact) -> list[str]:
    return target.remarks(artifact) if isinstance(target, RemarkingTarget) else []


def seeing(target: Target) -> SeeingTarget:
    """``target``, of which ``targets.SEEING`` says that it is one."""
    assert isinstance(target, SeeingTarget)
    return target
