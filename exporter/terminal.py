"""Where tables are printed."""

from __future__ import annotations

from rich.console import Console

_PIPED_WIDTH = 120


def open_console() -> Console:
    """stdout; into a file or a pipe the tables keep their full width."""
    console = Console()
    return console if console.is_terminal else Console(width=_PIPED_WIDTH)
