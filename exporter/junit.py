"""JUnit XML, as CI services read it: one suite for each bundle, one case for each check.

Elements and attributes are those of the schema that Jenkins' xUnit plugin publishes (junit-10.xsd).
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import TYPE_CHECKING

from exporter.checks import checks, title
from exporter.spec import Verdict

if TYPE_CHECKING:
    from exporter.pipeline import Outcome

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What no XML 1.0 document may hold (section 2.2, Char)."""


def junit(outcomes: Sequence[Outcome]) -> str:
    """A document with a suite for each of ``outcomes``: failed checks are failures, what was not measured is skipped,
    and a bundle that was refused is an error."""
    root = ET.Element("testsuites", name="llama-export validate")
    for outcome in outcomes:
        rows, name = checks(outcome), _clean(title(outcome))
        failed = sum(row.verdict is Verdict.FAILED for row in rows)
        refused = failed if outcome.error else 0
        suite = ET.SubElement(
            root,
            "testsuite",
            name=name,
            tests=str(len(rows)),
            failures=str(failed - refused),
            errors=str(refused),
            skipped=str(sum(row.verdict is Verdict.NOT_MEASURED for row in rows)),
        )
        for row in rows:
            case = ET.SubElement(suite, "testcase", name=row.name, classname=name)
            if row.verdict is Verdict.NOT_MEASURED:
                ET.SubElement(case, "skipped", message=_clean(f"not measured: {row.reason}"))
            elif row.verdict is Verdict.FAILED:
                kind = type(outcome.error).__name__ if outcome.error else "failed"
                fault = ET.SubElement(
                    case, "error" if outcome.error else "failure", message=_clean(row.reason), type=kind
                )
                fault.text = _clean(_words(row.figure, row.bound))
            if row.figure:
                ET.SubElement(case, "system-out").text = _clean(_words(row.figure, row.bound))
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _words(figure: str, bound: str) -> str:
    return f"{figure} (bound: {bound})" if bound else figure


def _clean(text: str) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
