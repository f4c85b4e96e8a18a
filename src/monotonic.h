/* Seconds on the monotonic clock, as Python's time.monotonic gives them. */
#ifndef WF_MONOTONIC_H
#define WF_MONOTONIC_H

#include <time.h>

static inline double wf_monotonic(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

#endif
