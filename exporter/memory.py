"""Memory of this host, and what nothing holds any more, given back before the next stage asks for its own."""

from __future__ import annotations

import ctypes
import gc
import os


def host_memory_bytes() -> int:
    """All there is, whoever holds it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def give_back_memory() -> None:
    """Collect cycles, which programs under construction are full of, and let the C library hand back what is free.

    glibc keeps freed blocks of up to 32 MiB (``M_MMAP_THRESHOLD``, mallopt(3)) for itself: after lowering 1B to Core
    ML, 0.9 of 1.6 GiB. Elsewhere there is no ``malloc_trim``, and nothing more is done.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
