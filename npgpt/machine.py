"""This computer: its name, its cores, its memory, and where a user's cache is."""

import contextlib
import ctypes
import functools
import math
import os
import platform
import sys
from pathlib import Path

PROC, SYS = Path("/proc"), Path("/sys")  # where Linux tells what it knows; elsewhere there are no such folders


def cpu_name():
    """What the processor calls itself."""
    with contextlib.suppress(OSError):
        for line in (PROC / "cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
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
    return Path(os.path.expanduser(base)) / "npgpt"


def _processor_ids():
    """The set of the logical processors' numbers that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def core_ids():
    """The set of the physical cores that this process may use, each the number of its first hyperthread.

    Elsewhere than on Linux nobody says which hyperthreads share a core: there each of them counts as one.
    """
    return set(map(_core_of, _processor_ids()))


def _core_of(processor):
    for name in ("core_cpus_list", "thread_siblings_list"):  # the newer name, the older one
        with contextlib.suppress(OSError, ValueError):
            siblings = (SYS / f"devices/system/cpu/cpu{processor}/topology/{name}").read_text()
            return int(siblings.replace("-", ",").split(",")[0])  # of "0,4", "0-1" or "0-1,8": the first is the lowest
    return processor


def cores():
    """How many physical cores this process may keep busy: so many threads are worth their while."""
    return min(len(core_ids()), quota())


def processors():
    """How many threads of this process can run at a time: more are never started, whatever is asked for."""
    return min(len(_processor_ids()), quota())


@functools.cache  # it is asked for often, and threads that have begun do not follow a change
def quota():
    """How many processors' time the container of this process may use: a whole number, or infinity."""
    limits = [math.inf]
    for group in _control_groups("cpu"):
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # cgroup v2, then v1
            with contextlib.suppress(OSError, ValueError):  # "max" is no limit
                limit, period = map(int, " ".join((group / name).read_text() for name in names).split())
                if limit > 0 < period:  # nor is -1
                    limits.append(-(-limit // period))  # with a thread less, nobody would use a part of a processor
    return min(limits)


def second_cache():
    """Bytes of a core's second cache, where Linux tells them; else 1 MiB, which most processors have at least."""
    with contextlib.suppress(OSError, ValueError):
        for folder in (SYS / "devices/system/cpu/cpu0/cache").glob("index*"):
            if (folder / "level").read_text().strip() == "2":
                size = int((folder / "size").read_text().strip().removesuffix("K")) * 1024
                return min(max(size, 2**18), 2**21)  # a virtual machine may say anything
    return 2**20


def in_use():
    """Bytes of memory that this process has now; 0 where that cannot be told."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int((PROC / "self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def available():
    """Bytes that this process may have in all, those that it has among them; None where that cannot be told."""
    return min((n for n in (_machine(), *_container()) if n is not None), default=None)


def _machine():
    with contextlib.suppress(OSError, ValueError):
        for line in (PROC / "meminfo").read_text().splitlines():
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
    for group in _control_groups("memory"):
        for limit, usage in (("max", "current"), ("limit_in_bytes", "usage_in_bytes")):
            with contextlib.suppress(OSError, ValueError):  # "max" is no limit
                left = int((group / f"memory.{limit}").read_text()) - int((group / f"memory.{usage}").read_text())
                yield left + in_use()


def _control_groups(controller):
    """The folders that may tell the limits of this process's own control group, and of each one above it.

    The root is always among them: a container may see its group there, but be told a path of the host's.
    """
    with contextlib.suppress(OSError):
        for line in os.fsdecode((PROC / "self/cgroup").read_bytes()).splitlines():
            kinds, _, path = line.partition(":")[2].partition(":")
            if kinds and controller not in kinds.split(","):
                continue
            # version 2 has no name; version 1's "cpu,cpuacct" is mounted by this name, or each by its own
            for root in {SYS / "fs/cgroup" / name for name in (kinds, kinds and controller)}:
                group = root / path.lstrip("/")
                yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))
