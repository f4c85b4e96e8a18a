"""A plain oracle of the cache."""

from __future__ import annotations

import math

from whisper_fast.cache import Cache


def conserved(cache):
    s = cache.stats()
    assert s.puts - s.evictions - s.expirations - s.removals == s.entries == len(cache) == len(cache.keys())
    assert s.weight <= s.max_weight
    return s


class Oracle:
    """What a cache must hold, as plain as it can be written: all that was put, less what it says it let go.

    Which entry goes is the policy's choice; that it must go, is told once, and is gone from then on, is checked here.
    """

    def __init__(self, bound):
        self.bound, self.held, self.now = bound, {}, 100.0
        self.guesses = set()  # keys that nobody has asked for yet
        self.count = dict.fromkeys(("hits", "misses", "puts", "refused", "evictions", "expirations", "removals"), 0)
        self.cache = Cache(bound, on_evict=self.gone, clock=lambda: self.now)

    def gone(self, key, value):
        known, _, expires = self.held.pop(key)
        assert known is value
        self.guesses.discard(key)
        self.count["expirations" if expires <= self.now else "evictions"] += 1

    def weight(self):
        return sum(weight for _, weight, _ in self.held.values())

    def live(self, key):
        """Return what is held under `key`, as it is after the cache has been asked."""
        return self.held[key][0] if key in self.held else None

    def get(self, key):
        found = self.cache.get(key)
        assert found is self.live(key)
        self.guesses.discard(key)
        self.count["hits" if found is not None else "misses"] += 1

    def put(self, key, value, weight=1, ttl=None):
        old = self.held.get(key)
        alive = old is not None and old[2] > self.now
        before = dict(self.held)
        expires = math.inf if ttl is None else self.now + ttl
        if alive:
            del self.held[key]
            self.count["removals"] += 1
        stored = self.cache.put(key, value, weight=weight, ttl=ttl)
        assert stored == (weight <= self.bound)
        self.count["puts" if stored else "refused"] += 1
        self.guesses.discard(key)
        if stored:
            least = sum(w for k, (_, w, _) in before.items() if k != key) + weight
            assert least > self.bound or len(self.held) == len(before.keys() - {key})  # nothing goes without need
            self.held[key] = (value, weight, expires)

    def put_many(self, keys, weight, ttl):
        """Only keys that are not held yet, each once, and no more than there is room for: nothing may go."""
        new = list(dict.fromkeys(key for key in keys if key not in self.held))
        new = new[: int((self.bound - self.weight()) // weight)] if weight else new
        values = {key: object() for key in new}
        assert self.cache.put_many(values, weight=weight, ttl=ttl) == len(new)
        self.count["puts"] += len(new)
        self.held |= {
            key: (value, weight, math.inf if ttl is None else self.now + ttl) for key, value in values.items()
        }

    def guess(self, key, value, weight, ttl):
        old = self.held.get(key)
        stays = old is not None and old[2] > self.now
        wanted = {k for k, (_, _, expires) in self.held.items() if expires > self.now and k not in self.guesses}
        stored = self.cache.guess(key, value, weight=weight, ttl=ttl)
        assert wanted <= self.held.keys()
        if stays:
            assert not stored
        elif stored:
            self.count["puts"] += 1
            self.held[key] = (value, weight, math.inf if ttl is None else self.now + ttl)
            self.guesses.add(key)
        else:
            self.count["refused"] += weight > self.bound
            assert self.weight() - sum(self.held[k][1] for k in self.guesses) + weight > self.bound

    def pop(self, key):
        known = self.held.get(key)
        if known and known[2] > self.now:
            del self.held[key]
            self.guesses.discard(key)
            self.count["removals"] += 1
            assert self.cache.pop(key) is known[0]
        else:
            assert self.cache.pop(key) is None

    def reweigh(self, key, weight):
        known = self.held.get(key)
        held = known is not None and known[2] > self.now
        if held and weight <= self.bound:
            self.held[key] = (known[0], weight, known[2])
        assert self.cache.reweigh(key, weight) == (held and weight <= self.bound)

    def clear(self):
        self.count["removals"] += len(self.held)
        self.held.clear()
        self.guesses.clear()
        self.cache.clear()

    def same(self):
        stats = conserved(self.cache)
        assert {name: getattr(stats, name) for name in self.count} == self.count
        assert stats.weight == self.weight()
        assert set(self.cache.keys()) == set(self.held)
