"""What a process must ask the system for before a kernel may use it."""

import ctypes
import functools
import platform
import sys


@functools.cache
def amx_is_permitted():
    """Whether the processor has AMX and Linux lets this process use its registers: it asks for that, once."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    arch_prctl, request_permission, tiles = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tiles) == 0
