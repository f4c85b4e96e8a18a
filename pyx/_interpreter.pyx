"""What a thread finds that wants the interpreter: how long it has to wait for it.

A call from Python cannot tell: when it looks at the clock for the first time it has the interpreter already, and what
it waited for before may as well have been a processor. So the clock is read once without it and once with it.
"""

from posix.time cimport CLOCK_MONOTONIC, clock_gettime, nanosleep, timespec

__all__ = ["waited"]

cdef enum:
    LONGEST = 60  # seconds


def waited(double pause, /):
    """Sleep for `pause` seconds without the interpreter; return the seconds that it then took to get it.

    Where nobody holds it that is a few microseconds. Raises ValueError for a pause that is negative, NaN,
    or more than 60 seconds.
    """
    if not 0 <= pause <= LONGEST:
        raise ValueError(f"pause is {pause}; 0 to {LONGEST} seconds are allowed")
    cdef timespec span, before, after
    span.tv_sec = <int>pause
    span.tv_nsec = <int>((pause - <int>pause) * 1e9)
    with nogil:
        nanosleep(&span, NULL)
        clock_gettime(CLOCK_MONOTONIC, &before)
    clock_gettime(CLOCK_MONOTONIC, &after)
    return max(0.0, <double>(after.tv_sec - before.tv_sec) + 1e-9 * <double>(after.tv_nsec - before.tv_nsec))
