"""This computer: its name, its cores, its memory, and where a user's cache is."""

import contextlib
import ctypes
import os
import platform
import sys
from pathlib import Path


def cpu_name():
    """What the processor calls itself."""
    with contextlib.suppress(OSError):  # Linux; elsewhere there is no such file
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cache_folder():
    """The per-user folder for compiled kernels and downloaded corpora, by the platform's custom."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/AppData/Local")
    elif sys.platform == "darwin":
        base = os.path.expanduser("~/Library/Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "npgpt"


def core_ids():
    """The set of the cores' numbers that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def cores():
    """How many cores this process may use."""
    return len(core_ids())


def in_use():
    """Bytes of memory that this process has now; 0 where that cannot be told."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def available():
    """Bytes that this process may have in all: what it has, and what the machine or its container has left.

    None where that cannot be told.
    """
    found = [_machine(), *_container()]
    return min((n for n in found if n is not None), default=None)


def _machine():
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 + in_use()
    if sys.platform == "win32":

        class Status(ctypes.Structure):
            _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
                (name, ctypes.c_ulonglong) for name in ("total", "left", "c", "d", "e", "f", "g")
            ]

        status = Status(length=ctypes.sizeof(Status))
        if ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
            return status.left
        return None
    with contextlib.suppress(OSError, ValueError, AttributeError):  # macOS: it gives away what it uses as a cache
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _container():
    """What the control groups of this process leave to it (cgroup v2, then v1)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds == "":
                base, limit, usage = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
            elif "memory" in kinds.split(","):
                base, limit, usage = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
            else:
                continue
            folder = base / path.lstrip("/")
            for place in (folder, *folder.parents):
                with contextlib.suppress(OSError, ValueError):  # "max" is no limit
                    yield int((place / limit).read_text()) - int((place / usage).read_text()) + in_use()
                if place == base:
                    break
