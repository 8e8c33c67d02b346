"""The border to coremltools: imported here and nowhere else, without its noise, with its exceptions turned into ours.

Import this module late: it takes seconds, and raises MissingToolError where coremltools is not installed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from exporter.errors import MissingToolError


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what coremltools says below the rank of an error.

    On Linux it reports eight missing macOS libraries at import, and versions of torch and scikit-learn that it has not
    been tested with; this route uses neither of them.
    """
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


with quiet():
    try:
        import coremltools as ct
        from coremltools.converters.mil import Builder as mb  # noqa: N813  (its own documentation's name)
        from coremltools.converters.mil.converter import mil_convert
        from coremltools.converters.mil.mil import Function, Program, get_new_symbol, types
        from coremltools.converters.mil.mil.passes import pass_pipeline
        from coremltools.proto import MIL_pb2, Model_pb2
    except ImportError as error:
        raise MissingToolError(
            f"the Core ML target needs coremltools, which cannot be imported: {error}",
            hint="pip install coremltools==9.0",
        ) from error

__all__ = [
    "Function",
    "MIL_pb2",
    "Model_pb2",
    "Program",
    "ct",
    "get_new_symbol",
    "mb",
    "mil_convert",
    "quiet",
    "types",
    "without_progress_bars",
]


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Run the passes of a conversion without the bar that each of them draws."""
    bar = pass_pipeline.tqdm
    pass_pipeline.tqdm = lambda passes, **_: passes
    try:
        yield
    finally:
        pass_pipeline.tqdm = bar
