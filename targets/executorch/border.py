"""The border to ExecuTorch's Python: its noise is silenced here, and its exceptions become ours, once."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

from exporter.errors import CapacityError, ExportError, LoweringError, MissingToolError

INSTALL = "install it with: pip install executorch==1.4.1"


@contextmanager
def toolchain(step: str) -> Iterator[None]:
    """Run foreign code that is to ``step`` ("write the program", ...).

    Silent are Python warnings (``torch._check_is_size`` gives one for each op) and log records up to WARNING (torchao
    names the GPU libraries that it did not find). Raises MissingToolError where a module is missing, CapacityError
    where memory is, LoweringError for what else the code raises, and lets an OSError pass: it is about a file of ours.
    """
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ExportError, OSError):
        raise
    except MemoryError as error:
        raise CapacityError(
            f"there is not enough memory to {step}", hint="free memory, or take a smaller precision"
        ) from error
    except ImportError as error:
        raise MissingToolError(f"ExecuTorch cannot be imported: {error}", hint=INSTALL) from error
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise LoweringError(
            f"ExecuTorch could not {step}: {reason}",
            hint="if `pip show executorch` gives 1.4.1, this is a fault of llama-export: please report it",
        ) from error
    finally:
        logging.disable(disabled)


def installed_version() -> str:
    """Of the ExecuTorch wheel. Raises MissingToolError."""
    try:
        return version("executorch")
    except PackageNotFoundError as error:
        raise MissingToolError("executorch is not installed", hint=INSTALL) from error
