"""A summary in GitHub's Markdown, for ``$GITHUB_STEP_SUMMARY``, and the workflow commands that annotate a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from exporter.bundle import MANIFEST
from exporter.checks import checks, title, verdict_of
from exporter.spec import Verdict

if TYPE_CHECKING:
    from exporter.pipeline import Outcome


def markdown(outcomes: Sequence[Outcome]) -> str:
    """A heading and a table for each of ``outcomes``; a check that is not green has its reason in the last column."""
    lines = []
    for outcome in outcomes:
        lines += [f"### {_cell(title(outcome))}: {verdict_of(outcome)}", ""]
        lines += ["| check | verdict | figure | bound | reason |", "|-|-|-|-|-|"]
        for row in checks(outcome):
            verdict = f"**{row.verdict}**" if row.verdict is Verdict.FAILED else row.verdict.value
            cells = (row.name, verdict, row.figure, row.bound, row.reason)
            lines.append("| " + " | ".join(map(_cell, cells)) + " |")
        if outcome.bisection:
            lines += ["", f"Bisected: {_cell(str(outcome.bisection))}"]
        lines.append("")
    return "\n".join(lines)


def workflow_commands(outcomes: Sequence[Outcome]) -> list[str]:
    """GitHub's workflow commands: an error for each check that failed, a notice for each that was not measured
    (docs.github.com, "Workflow commands for GitHub Actions")."""
    commands = []
    for outcome in outcomes:
        for row in checks(outcome):
            if row.verdict is Verdict.PASSED:
                continue
            level = "error" if row.verdict is Verdict.FAILED else "notice"
            file, name = _property(str(outcome.folder / MANIFEST)), _property(f"{title(outcome)}: {row.name}")
            commands.append(f"::{level} file={file},title={name}::{_data(row.reason)}")
    return commands


def _cell(text: str) -> str:
    """In a table ``|`` ends a cell and a line break the row; ``<`` would begin HTML."""
    one_line = " ".join(text.split())
    return one_line.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
