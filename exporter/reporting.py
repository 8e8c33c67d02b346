"""The border of the command line: progress on stderr, and every error as a sentence, a hint and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from exporter import interrupt
from exporter.errors import INTERRUPTED, ExportError, InputError


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


def _fail(error: ExportError) -> None:
    typer.echo(f"error: {error}\nhint: {error.hint}", err=True)
    raise typer.Exit(error.exit_code) from None
