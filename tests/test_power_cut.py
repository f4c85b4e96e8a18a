"""Power cuts at any moment: nothing accepted is lost, nothing is answered twice, the database always opens."""

from collections import Counter

import pytest

from whisper_fast.lab.faulty_disk import memory_folder
from whisper_fast.lab.power_cut import cuts, record


async def total(count, seed, monkeypatch, messages=240):
    monkeypatch.setattr("whisper_fast.store.checkpoints.PAGES", 40)  # a short run has many checkpoints
    monkeypatch.setattr("whisper_fast.store.checkpoints.SHORT", 20)
    with memory_folder() as folder:
        events = await record(folder, messages=messages, processes=3, seed=seed)
    kinds = Counter(event.kind for event in events)
    assert kinds["note"] > messages / 2
    assert kinds["failed sync"]
    found = Counter()
    for cost in cuts(events, count, seed=seed):
        found.update(cost)
    return found


async def test_a_few_hundred_cuts(monkeypatch):
    assert await total(300, 1, monkeypatch) == {"lost": 0, "twice": 0, "damaged": 0}


@pytest.mark.soak
async def test_ten_thousand_cuts(monkeypatch):
    found = Counter()
    for seed in range(20):
        found.update(await total(500, seed, monkeypatch))
    assert found == {"lost": 0, "twice": 0, "damaged": 0}


@pytest.mark.parametrize("way", ["synchronous", "settling"])
async def test_the_cuts_find_what_they_look_for(monkeypatch, way):
    """Without the sync of each commit, or without that of the log at the start, messages are lost."""
    if way == "synchronous":
        from whisper_fast.store import opened

        real = opened.connect

        def careless(*args, **kwargs):
            connection = real(*args, **kwargs)
            connection.pragma("synchronous", "normal")
            return connection

        monkeypatch.setattr(opened, "connect", careless)
    else:
        monkeypatch.setattr("whisper_fast.store.opened.settle_log", lambda *_: None)
        monkeypatch.setattr("whisper_fast.lab.power_cut.die", with_a_sync)
    found = Counter()
    for seed in range(40):  # how the writes fall is the machine's: about every second seed finds it
        found.update(await total(80, seed, monkeypatch))
        if found["lost"] + found["damaged"]:
            return
    raise AssertionError(f"3,200 power cuts and nothing lost: {found}")


def with_a_sync(disk, random, messages):
    """The death that leaves commits which can be read and are not on the disk."""
    disk.fail("xSync", nth=random.randrange(messages // 8, messages // 4), suffix="-wal", fatal=True)
