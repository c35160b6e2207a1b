"""Keeping freed memory in the process: a third of a stage's time goes to page faults otherwise.

Every training step frees its activations and asks for the same again. glibc gives blocks of more
than 128 kB back to the system at once, and the next step pays for each page anew: on the built-in
suites' CNN 2,700 page faults per step of 32 images, and 1.5 times the processor time without them
(1.8 times in forward passes).
"""

import ctypes

# From glibc's malloc.h, with values in bytes.
_SETTINGS = {
    -1: 256 << 20,  # M_TRIM_THRESHOLD: so much may lie free before any is given back
    -2: 64 << 20,  # M_TOP_PAD: how much to ask for at a time
    -3: 32 << 20,  # M_MMAP_THRESHOLD: larger blocks still go back at once; more is not allowed
}


def keep_freed_memory() -> bool:
    """Has the C library keep up to 256 MB of freed memory, for the whole process and for good.

    For processes of our own; a user's process is left alone. Settings in the environment
    (`MALLOC_TRIM_THRESHOLD_` and its like) are overridden.

    Returns:
        Whether the C library took the settings: glibc does.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; another system
        return False
    return all([bool(mallopt(name, value)) for name, value in _SETTINGS.items()])
