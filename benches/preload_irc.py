"""How often a user's first message finds everything in memory, with preload and without: `python preload_irc.py`.

Users are those of a public channel (../shared/data/irc, or WHISPER_FAST_DATA), and generated ones of three kinds. A
visit begins after 15 minutes without a message; without preload nothing of it is in memory then. Printed are the
share of visits that began warm, in all and once a user has been seen 20 times, the share of loads that were right,
loads per visit, hours that loads stayed resident per visit, and the same for a keep-alive of 24 hours. Then, with a
cache that has room for some of the users only, how many messages of all find their user in it: what is loaded before
it is asked for may not drive out what is.
"""

from __future__ import annotations

import asyncio
import gzip
import os
import random
import re
import time
from datetime import UTC, datetime
from pathlib import Path

from whisper_fast import clock
from whisper_fast.cache import Cache
from whisper_fast.preload import Preload

GAP, KEEP = 900, 86_400
LINE = re.compile(r"\[(\d\d):(\d\d)\] <([^>]+)>")
DATA = Path(os.environ.get("WHISPER_FAST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def irc():
    """All messages of the channel: (epoch seconds, nick); days follow each other as they did."""
    midnight, events = 0.0, []
    with gzip.open(DATA / "irc" / "ubuntu_irc_days.txt.gz", "rt", errors="replace") as lines:
        for line in lines:
            if line.startswith("### "):
                midnight = datetime.strptime(line[4:].strip(), "%Y-%m-%d").replace(tzinfo=UTC).timestamp()
            elif found := LINE.match(line):
                hour, minute, nick = found.groups()
                events.append((midnight + int(hour) * 3600 + int(minute) * 60, nick))
    return sorted(events, key=lambda event: event[0])


def periodic(rng):
    """Begin visits every hour to every two days, 2 % more or less."""
    period, at = rng.uniform(3600, 2 * 86_400), 1e9
    while True:
        at += period * rng.gauss(1, 0.02)
        yield at


def diurnal(rng):
    """Begin one to three visits a day, each at its own time, with a deviation of ten minutes."""
    hours, offset, day = sorted(rng.sample(range(0, 24, 4), rng.choice([1, 2, 3]))), rng.uniform(0, 3600), 11_574
    while True:
        for hour in hours:
            yield day * 86_400 + hour * 3600 + offset + rng.gauss(0, 600)
        day += 1


def poisson(rng):
    """Begin visits at random, one an hour to one a day in the mean."""
    mean, at = rng.choice([3600, 6 * 3600, 86_400]), 1e9
    while True:
        at += rng.expovariate(1 / mean)
        yield at


def generated(kind, users=200, visits=120):
    """All messages of generated users; a visit is three of them within two minutes."""
    rng = random.Random(f"{kind.__name__} 7")
    events = []
    for n in range(users):
        for _, at in zip(range(visits), kind(rng), strict=False):
            events += [(at + 60 * k, f"{kind.__name__} {n}") for k in range(3)]
    return sorted(events)


async def replay(events):
    """Lead the events through a Preload in virtual time; return its figures."""
    now, since, hours = 0.0, {}, 0.0
    figures = dict.fromkeys(("visits", "warm", "known", "known_warm", "kept"), 0)
    last, seen = {}, {}

    async def load(user, seconds):
        since[user] = now
        return True

    def let_go(user):
        nonlocal hours
        hours += (now - since.pop(user)) / 3600

    with clock.replaced(monotonic=lambda: now, wall=lambda: now):
        preload = Preload(load, let_go, gap=GAP, enabled=lambda: True, most=1 << 20)
        for at, user in events:
            while preload._due and preload._due[0][0] <= at:
                now = max(now, preload._due[0][0])
                await preload.work()
            now = at
            if user not in last or at - last[user] > GAP:
                warm = user in preload._probation
                known = seen[user] = seen.get(user, 0) + 1
                figures["visits"] += 1
                figures["warm"] += warm
                figures["known"] += known > 20
                figures["known_warm"] += warm and known > 20
                figures["kept"] += user in last and at - last[user] <= KEEP
            preload.seen(user)
            if user in since:
                let_go(user)
            last[user] = at
    return figures, preload.counts, hours


async def demand(events, room, *, preloading):
    """Return the share of messages whose user is in a cache of `room` users, which preload fills besides, or not."""
    now = 0.0

    async def load(user, seconds):
        return cache.guess(user, True, ttl=max(seconds, GAP))

    with clock.replaced(monotonic=lambda: now, wall=lambda: now):
        cache = Cache(room, clock=lambda: now, ttl=GAP)
        preload = Preload(load, cache.pop, gap=GAP, enabled=lambda: preloading)
        for at, user in events:
            while preload._due and preload._due[0][0] <= at:
                now = max(now, preload._due[0][0])
                await preload.work()
            now = at
            preload.seen(user)
            if cache.get(user) is None:
                cache.put(user, True)
            else:
                cache.put(user, True, ttl=GAP)
    return cache.stats().hits / len(events)


def show_demand(name, events):
    """Print the demand hit ratio with preload and without at three sizes."""
    users = len({user for _, user in events})
    for share in (0.02, 0.05, 0.2):
        room = max(1, int(share * users))
        plain, loaded = (asyncio.run(demand(events, room, preloading=on)) for on in (False, True))
        print(
            f"{name:10} room for {room:5} of {users} users: {plain:.2%} of messages find their user without preload, "
            f"{loaded:.2%} with it ({100 * (loaded - plain):+.2f} points)"
        )


def show(name, events):
    """Print one line."""
    began = time.perf_counter()
    figures, counts, hours = asyncio.run(replay(events))
    visits, known = figures["visits"], max(1, figures["known"])
    judged = max(1, counts["right"] + counts["wrong"])
    print(
        f"{name:10} {visits:7} visits  warm {figures['warm'] / visits:6.1%} (without 0.0%; known users "
        f"{figures['known_warm'] / known:6.1%})  precision {counts['right'] / judged:6.1%}  loads/visit "
        f"{counts['loads'] / visits:7.3%}  wrong/visit {counts['wrong'] / visits:7.3%}  resident h/visit "
        f"{hours / visits:6.3f}  keep-alive 24 h: warm {figures['kept'] / visits:6.1%}  "
        f"[{(time.perf_counter() - began) / len(events) * 1e6:.1f} us a message]"
    )


if __name__ == "__main__":
    for kind in (periodic, diurnal, poisson):
        show(kind.__name__, events := generated(kind))
        show_demand(kind.__name__, events)
    if (DATA / "irc").is_dir():
        show("irc", events := irc())
        show_demand("irc", events)
    else:
        print(f"irc: skipped, there is no {DATA / 'irc'} (WHISPER_FAST_DATA names the folder)")
