"""Fills the table of README.md from what the tests have told: ``python -m tests.readme_table REPORT...``, JUnit XML.

Ends with 1 where the table is another one than it was, so that what is committed is what was measured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from targets import NAMES as TARGETS
from tests.formats import FORMATS, was_released
from tests.generations import GENERATIONS

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- filled by make test-matrix -->\n", "<!-- end of what is filled -->\n"
KINDS = ("reads", "takes", "exports")
"""Properties of tests: a generation in a format is read, a format goes to a target, a generation goes to a target."""


@dataclass(frozen=True, slots=True)
class Shown:
    """The outcome of a test: green, refused in a sentence, or red with the sentence for what is missing."""

    green: bool
    refused: str = ""
    missing: str = ""


def outcomes(report: Path) -> Iterator[tuple[tuple[str, str, str], Shown]]:
    """By kind and the two names of its property."""
    for case in ElementTree.parse(report).iter("testcase"):
        told = {item.get("name"): item.get("value") or "" for item in case.iter("property")}
        for kind in KINDS:
            if kind in told:
                first, second = told[kind].split(" | ")
                yield (kind, first, second), _shown(case, refused=told.get("refused", ""))


def _shown(case: ElementTree.Element, *, refused: str) -> Shown:
    skipped = case.find("skipped")
    if skipped is not None:
        return Shown(green=False, missing=skipped.get("message") or "skipped")
    if any(case.find(kind) is not None for kind in ("failure", "error")):
        return Shown(green=False, missing="its test fails")
    return Shown(green=not refused, refused=refused)


def table(found: Mapping[tuple[str, str, str], Shown]) -> str:
    """Markdown: a row for each generation, a column for each format: the targets that are not green, and
    ``none`` where there is no such release."""
    notes: list[str] = []
    lines = ["| | " + " | ".join(FORMATS) + " |", "|-" * (len(FORMATS) + 1) + "|"]
    for generation in GENERATIONS:
        cells = [_cell(found, generation, format, notes) for format in FORMATS]
        lines.append(f"| {generation} | {' | '.join(cells)} |")
    numbered = [f"{number}. {note}" for number, note in enumerate(notes, start=1)]
    return "\n".join([*lines, "", *numbered]) + "\n"


def _cell(found: Mapping[tuple[str, str, str], Shown], generation: str, format: str, notes: list[str]) -> str:
    if not was_released(generation, format):
        return "none"
    exceptions: dict[str, list[str]] = {}
    for target in TARGETS:
        keys = (("reads", generation, format), ("takes", format, target), ("exports", generation, target))
        steps = (found.get(key, Shown(green=False, missing="not measured")) for key in keys)
        if bad := next((step for step in steps if not step.green), None):
            note = f'refused: "{bad.refused}"' if bad.refused else f"**red**: {bad.missing}"
            exceptions.setdefault(note, []).append(target)
    notes += [note for note in exceptions if note not in notes]
    if sum(map(len, exceptions.values())) == len(TARGETS):
        return ", ".join(f"{note.partition(':')[0]} ({notes.index(note) + 1})" for note in exceptions)
    told = [
        f"{'**red** ' if note.startswith('**') else ''}{', '.join(targets)} ({notes.index(note) + 1})"
        for note, targets in exceptions.items()
    ]
    return f"all but {', '.join(told)}" if told else "all"


def main() -> int:
    readme = README.read_text(encoding="utf-8")
    before, _, rest = readme.partition(BEGIN)
    old, _, after = rest.partition(END)
    new = table({key: shown for report in sys.argv[1:] for key, shown in outcomes(Path(report))})
    README.write_text(before + BEGIN + new + END + after, encoding="utf-8")
    if old == new:
        return 0
    print("README.md has another table of generations and formats now: look at it, and commit it")
    return 1


if __name__ == "__main__":
    sys.exit(main())
