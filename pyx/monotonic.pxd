# Seconds on the monotonic clock: see src/monotonic.h.
cdef extern from "monotonic.h" nogil:
    double wf_monotonic()
