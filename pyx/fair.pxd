# The structure of a fair queue, in plain C: see src/fair.h.
from libc.stdint cimport int32_t, uint32_t

cdef extern from "fair.h" nogil:
    enum:
        WF_NOBODY
        WF_LEVELS

    ctypedef struct wf_waiter:
        void *item
        double charge
        uint32_t generation
        int32_t flow
        int32_t later

    ctypedef struct wf_flow:
        void *user
        double counter
        int32_t level
        int32_t first

    ctypedef struct wf_level:
        double clock
        int32_t count

    ctypedef struct wf_fair:
        wf_waiter *entries
        wf_flow *flows
        wf_level *levels[WF_LEVELS]
        int32_t busy[WF_LEVELS]
        int32_t busy_count
        int32_t entry_capacity
        int32_t flow_count
        int32_t count
        int32_t oldest

    void wf_fair_begin(wf_fair *q)
    void wf_fair_end(wf_fair *q)
    int wf_fair_reserve(wf_fair *q, int32_t level)
    int32_t wf_fair_open(wf_fair *q, void *user, int32_t level, double counter)
    void wf_fair_close(wf_fair *q, int32_t flow)
    int32_t wf_fair_forgettable(const wf_fair *q, int32_t level)
    int32_t wf_fair_append(wf_fair *q, int32_t flow, void *item, double charge)
    int32_t wf_fair_next(const wf_fair *q)
    void wf_fair_serve(wf_fair *q, int32_t flow, double charge)
    void wf_fair_remove(wf_fair *q, int32_t entry)
    void wf_fair_charge(wf_fair *q, int32_t flow, double amount)
