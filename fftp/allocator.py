"""Memory that a command keeps: what one step frees, the next one takes again."""

import ctypes
import platform

# Of glibc's malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST = 1 << 30  # bytes of an allocation that goes back to the system when it is freed


def keep_memory() -> bool:
    """Let this process keep what it frees, up to LARGEST a piece; whether that could be arranged (glibc alone has it).

    By default glibc gives large pieces back, and the system hands them out again page by page, zeroed: a step's activations
    are large pieces, and so some hundred thousand page faults a step. For commands: a library does not decide this.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP_THRESHOLD, LARGEST)) and bool(mallopt(TRIM_THRESHOLD, 2**31 - 1))
