"""The border of the command line: progress on stderr, and every error as a sentence, a hint and an exit code."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from exporter import interrupt
from exporter.errors import INTERRUPTED, UNFORESEEN, CapacityError, ExportError, InputError

_TORCH_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"
"""How torch 2.13 says so, in a RuntimeError."""


@contextmanager
def reporting() -> Iterator[Any]:
    """Gives the progress to tell a run to; whatever the block raises ends the program as a user should see it."""
    from exporter.progress import TerminalProgress

    try:
        try:
            with TerminalProgress() as progress:
                yield progress
        except Exception:
            interrupt.check()  # it may be what native code made of one
            raise
    except ExportError as error:
        _fail(error)
    except KeyboardInterrupt:
        typer.echo("interrupted: nothing half written was left behind", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        raise  # the reader of our output has gone, which Typer ends quietly
    except OSError as error:
        from exporter.files import disk_full

        found = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        _fail(disk_full(error) or InputError(found, hint="check the path and its permissions"))
    except typer.Exit:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or _TORCH_OUT_OF_MEMORY in str(error):
            _fail(CapacityError("the memory is full", hint="close what else holds memory, or take a smaller --context"))
        _fail_unforeseen(error)


def _fail_unforeseen(error: Exception) -> None:
    """What no class of ``exporter.errors`` stands for is a fault of ours; the traceback is kept in a file."""
    with tempfile.NamedTemporaryFile("w", prefix="llama-export-", suffix=".txt", delete=False) as file:
        traceback.print_exception(error, file=file)
    typer.echo(
        f"error: {type(error).__name__}: {error}\n"
        f"hint: this is a fault of llama-export, not of yours; please report it with {file.name}",
        err=True,
    )
    raise typer.Exit(UNFORESEEN) from None


def _fail(error: ExportError) -> None:
    typer.echo(f"error: {error}\nhint: {error.hint}", err=True)
    raise typer.Exit(error.exit_code) from None
