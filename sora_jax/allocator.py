"""The C library's memory, on hosts whose CPUs compute.

XLA's CPU backend asks the C library for the buffers of a program each time it runs, and gives them
back. glibc takes large ones from the system, where every page is filled with zeros at its first
touch: a fifth of the time of a small transformer's gradient (docs/benchmarks.md).
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = -1  # as size_t: larger than any heap


def suit_backend() -> bool:
    """`keep_buffers` where programs will run on CPUs, as far as can be told before JAX starts.

    Returns whether it did. Too late once a JAX backend is there, whose threads have memory of
    their own: then it changes nothing.
    """
    return computes_on_cpus() and keep_buffers()


def computes_on_cpus() -> bool:
    """Whether JAX is told to, or has nothing else: no package of an accelerator is installed."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms.split(",")[0] == "cpu"
    modules = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    return not modules and not importlib.metadata.entry_points(group="jax_plugins")


def keep_buffers() -> bool:
    """From now on all threads take large buffers from one heap, which stays.

    The process keeps the memory of its peak, and what lies in holes of the heap: in all up to a
    third more. For training; sampling gains little. Other allocators (LD_PRELOAD) take no notice.

    Returns whether the C library can.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    # Threads' own heaps are of 64 MiB at most; what is larger would come from the system after all.
    settings = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _NEVER}
    return all(mallopt(name, value) == 1 for name, value in settings.items())
