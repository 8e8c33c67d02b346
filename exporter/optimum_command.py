"""``optimum-cli export llama-edge ...``: the same command, reached through optimum's registration namespace (PEP 420).

Installed as ``optimum/commands/register/llama_edge.py`` (see pyproject.toml). Optimum loads every file of that folder
at start-up, so nothing heavy is imported before ``run``.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class LlamaEdgeCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum has no types
    """Hands its words, options and ``--help`` included, to the command line of llama-export."""

    COMMAND = CommandInfo(name="llama-edge", help="Export a Llama to ExecuTorch, ONNX Runtime or Core ML with proofs.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        def take_every_word(words: Sequence[str], _namespace: Namespace | None = None) -> tuple[Namespace, list[str]]:
            return Namespace(func=parser.get_default("func"), words=list(words)), []

        parser.parse_known_args = take_every_word  # type: ignore[method-assign, assignment]

    def run(self) -> None:
        from exporter.cli import app

        app(args=self.args.words, prog_name="optimum-cli export llama-edge")


REGISTER_COMMANDS = [(LlamaEdgeCommand, ExportCommand)]
