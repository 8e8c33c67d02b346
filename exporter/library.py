"""The calls of the public interface (``exporter.__all__``): the pipeline without a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

from calibration.layers import SILENT
from exporter import pipeline
from exporter.generation import Conversation, Decoding, OpenedBundle, open_for_running
from exporter.limits import Limits
from exporter.planning import DEFAULT_THREADS, default_store
from exporter.spec import Plan, Progress

if TYPE_CHECKING:
    from targets.base import Runner


def export(plan: Plan, progress: Progress = SILENT) -> list[pipeline.Outcome]:
    """Carry out a plan: a bundle for each of its targets, proven. An outcome has ``folder``, ``exit_code``, the
    ``manifest``, and an ``error`` where there is no artifact.

    Raises ExportError for what concerns all targets; one target's failure is its outcome's.
    """
    return pipeline.export(plan, progress)


def validate(
    bundle: Path | str,
    *,
    against: Path | str | None = None,
    adapter: Path | str | None = None,
    calibration: str | None = None,
    calibration_column: str | None = None,
    eval_text: Path | str | None = None,
    store: Path | str | None = None,
    threads: int = DEFAULT_THREADS,
    progress: Progress = SILENT,
) -> pipeline.Outcome:
    """Prove a bundle again, alone or ``against`` the checkpoint it was made from: as the command of that name.

    Raises InputError for a bundle that is not whole.
    """
    return pipeline.validate(
        Path(bundle),
        against=Path(against) if against else None,
        adapter=Path(adapter) if adapter else None,
        corpus=calibration,
        corpus_column=calibration_column,
        store_root=Path(store) if store else default_store(),
        evaluation_text=Path(eval_text) if eval_text else None,
        threads=threads,
        limits=Limits(),
        bisect=False,
        compute_units=None,
        device_report=None,
        progress=progress,
    )


class Drawing(TypedDict, total=False):
    """How tokens are drawn: see ``exporter.generation.Decoding``. Greedy if nothing is said."""

    temperature: float
    top_k: int
    top_p: float
    seed: int


class LoadedBundle:
    """A bundle whose artifact is loaded: its ``manifest``, its ``runner``, and text from it."""

    def __init__(self, opened: OpenedBundle, runner: Runner) -> None:
        self.manifest = opened.manifest
        self.tokenizer = opened.tokenizer
        self.runner = runner
        self._opened = opened

    def generate(
        self, prompt: str | Sequence[dict[str, str]], *, max_tokens: int = 128, **decoding: Unpack[Drawing]
    ) -> str:
        """The answer to a text, or to messages in the chat template. Raises InputError where it leaves no room."""
        return "".join(self.stream(prompt, max_tokens=max_tokens, **decoding))

    def stream(
        self, prompt: str | Sequence[dict[str, str]], *, max_tokens: int = 128, **decoding: Unpack[Drawing]
    ) -> Iterator[str]:
        """As ``generate``, piece by piece; characters come whole."""
        tokenizer = self.tokenizer
        ids = (
            tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.encode_rendered(tokenizer.render(prompt))
        )
        _, pieces = Conversation(self._opened, self.runner, Decoding(**decoding)).reply(ids, max_tokens=max_tokens)
        return pieces


@contextmanager
def open_bundle(folder: Path | str, *, threads: int = DEFAULT_THREADS) -> Iterator[LoadedBundle]:
    """Check every byte of a bundle, load its artifact on this host, and close it at the end of the block.

    Raises InputError for a bundle that is not whole, HostError where this host cannot run it.
    """
    opened = open_for_running(Path(folder))
    with opened.target.open(opened.artifact, threads=threads) as runner:
        yield LoadedBundle(opened, runner)
