"""A model server with a known optimum, on a virtual clock: so many calls at once, the others wait inside it."""

from __future__ import annotations

import heapq
import random
from collections import deque


class Server:
    """Works on `capacity` calls at once, `base + per * tokens` seconds each, times `slowness`.

    With `refuses` it answers 429 to a call beyond its capacity, otherwise the call waits inside. A call that takes
    longer than `timeout` is given up by its caller.
    """

    def __init__(self, limit, *, seed=1, capacity=64, refuses=False, timeout=None, tokens=None, offered=None):
        self.limit, self.rng = limit, random.Random(seed)
        self.capacity, self.refuses, self.timeout = capacity, refuses, timeout
        self.tokens = tokens or (lambda: max(1.0, self.rng.lognormvariate(5.5, 0.6)))
        self.offered = offered or (lambda: 1 << 30)
        self.base, self.per, self.slowness, self.delay = 0.5, 0.015, 1.0, 0.0
        self.now, self.in_flight, self.running = 0.0, 0, 0
        self.queue, self.events, self.number = deque(), [], 0
        self.calls = self.work = self.refused = self.late = 0
        self.history = []  # (window, value)

    @property
    def value(self):
        return self.limit if isinstance(self.limit, int) else self.limit.value

    def run(self, until):
        """Go on until `until`, with as many calls in flight as the limit and the offer allow."""
        self._admit()
        while self.events and self.events[0][0] <= until:
            self.now, _, begun, tokens = heapq.heappop(self.events)
            self.running -= 1
            self._work_on()
            self._ended(begun, tokens)
            self.in_flight -= 1
            self._admit()
        self.now = until

    def windows(self, count, longest=1e6):
        """Go on for `count` windows of the limit; return the values it had at their ends."""
        before, values = self.limit.windows, []
        while self.limit.windows < before + count and self.now < longest:
            seen = self.limit.windows
            while self.limit.windows == seen and self.now < longest:
                self.run(self.now + 0.5)
            values.append(self.limit.value)
        return values

    def _admit(self):
        while self.in_flight < min(self.value, self.offered()):
            self.calls += 1
            if self.refuses and self.in_flight >= self.capacity:
                self.refused += 1
                if isinstance(self.limit, int):
                    return
                self.limit.refused(self.now, self.now, self.in_flight + 1)
                continue
            self.in_flight += 1
            self.queue.append((self.now, self.tokens()))
            self._work_on()

    def _work_on(self):
        while self.queue and self.running < self.capacity:
            begun, tokens = self.queue.popleft()
            seconds = (self.base + self.per * tokens) * self.slowness * self.rng.uniform(0.95, 1.05) + self.delay
            self.running += 1
            self.number += 1
            heapq.heappush(self.events, (self.now + seconds, self.number, begun, tokens))

    def _ended(self, begun, tokens):
        if self.timeout is not None and self.now - begun > self.timeout:
            self.late += 1
            if not isinstance(self.limit, int):
                self.limit.late(self.now, begun, self.in_flight)
            return
        self.work += tokens
        if not isinstance(self.limit, int):
            self.limit.answered(self.now, begun, self.in_flight, tokens)
