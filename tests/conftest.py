"""Fixtures for all tests: both event loops, and proof that nothing outlives a test."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import uvloop

LOOPS = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}
made: list[asyncio.AbstractEventLoop] = []


def remembered(factory):
    def make():
        made.append(factory())
        return made[-1]

    return make


def pytest_asyncio_loop_factories(config, item):
    one = item.get_closest_marker("one_loop") and not config.getoption("--soak")
    return {name: remembered(factory) for name, factory in LOOPS.items() if name == "uvloop" or not one}


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="also run what takes minutes")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--soak"):
        for item in items:
            if item.get_closest_marker("soak"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: `make soak`"))


def pytest_collection_finish():
    """What was imported stays: tests that collect garbage need not look through it each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Fail a test that leaves a task behind; the loop's runner would cancel it in silence afterwards."""
    made.clear()
    result = yield
    left = [task for loop in made if not loop.is_closed() for task in asyncio.all_tasks(loop)]
    assert not left, f"tasks left alive: {left}"
    return result


def alive(before=frozenset()):
    """Return what is alive; what a child that was there `before` has started is its own to end."""
    process = psutil.Process()
    threads = {t.name for t in threading.enumerate() if t is not threading.main_thread()}
    children = {f"{child.pid} {child.name()}" for child in family(process, before)}
    sockets = {f"{c.laddr}->{c.raddr}" for c in process.net_connections() if c.status != "TIME_WAIT"}
    return {"threads": threads, "children": children, "sockets": sockets, "shared memory": shared_memory()}


def family(process, without):
    for child in process.children():
        if child.pid not in without:
            yield child
            with suppress(psutil.NoSuchProcess):
                yield from child.children(recursive=True)


def shared_memory():
    """Return the shared-memory files that are ours: by their name, or because this process has them mapped."""
    if not os.path.isdir("/dev/shm"):
        return set()
    maps, mine = Path("/proc/self/maps").read_text(), f"whisper-fast-{os.getpid()}-"
    names = {path.name for path in Path("/dev/shm").iterdir()}
    return {name for name in names if name.startswith(mine) or f"/dev/shm/{name}" in maps}


@pytest.fixture(autouse=True)
def logs_as_before():
    """What a command has told the logging of its process goes with the command."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler:
            root.removeHandler(handler)


@pytest.fixture(autouse=True)
def nothing_left():
    """After each test no thread, process, socket or shared-memory file is left that was not there before."""
    before, children = alive(), {child.pid for child in psutil.Process().children()}
    yield
    after = alive(children)
    left = {kind: after[kind] - before[kind] for kind in after if after[kind] - before[kind]}
    assert not left, f"left alive: {left}"
