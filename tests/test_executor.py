"""The executor: what runs where, what it learns, and what survives."""

from __future__ import annotations

import asyncio
import contextvars
import multiprocessing.resource_tracker
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial

import errands
import psutil
import pytest

from whisper_fast.errors import Closed, DeadlineExceeded, Overloaded, WorkerDied
from whisper_fast.executor import Executor
from whisper_fast.profile import Profile, known_by_name


@pytest.fixture(autouse=True, scope="module")
def tracker():
    """Python's own resource tracker lives as long as the interpreter; start it before any test counts processes."""
    multiprocessing.resource_tracker.ensure_running()


class Gate:
    """Holds threads until it is opened."""

    def __init__(self):
        self.event = threading.Event()
        self.entered = threading.Semaphore(0)

    def wait(self, value=None):
        self.entered.release()
        assert self.event.wait(10)
        return value

    def inside(self):
        """Wait, off the loop's time, until one more thread is inside."""
        assert self.entered.acquire(timeout=10)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


# ---- where it runs


@pytest.mark.parametrize("kind", ["auto", "inline", "thread"])
async def test_results_errors_and_context(kind):
    place = contextvars.ContextVar("place")
    place.set("here")
    async with Executor(threads=2) as executor:
        assert await executor.run(pow, 2, 10, kind=kind) == 1024
        assert await executor.run(partial(int, base=2), "101", kind=kind) == 5
        assert await executor.run(place.get, kind=kind) == "here"
        with pytest.raises(ZeroDivisionError):
            await executor.run(lambda: 1 / 0, kind=kind)
        with pytest.raises(KeyError):
            await executor.run({}.__getitem__, "k", kind=kind)


async def test_threads_and_processes_are_others():
    async with Executor(threads=2, processes=1) as executor:
        assert await executor.run(threading.get_ident, kind="inline") == threading.get_ident()
        assert await executor.run(threading.get_ident, kind="thread") != threading.get_ident()
        name = await executor.run(lambda: threading.current_thread().name)
        assert name.startswith("whisper-fast-thread-")
        assert await executor.run(os.getpid, kind="process") != os.getpid()
        assert executor.stats().processes == 1


@pytest.mark.parametrize("kind", ["inline", "thread"])
async def test_stop_iteration_does_not_hang(kind):
    async with Executor(threads=1) as executor:
        with pytest.raises(RuntimeError, match="StopIteration"):
            await executor.run(next, iter(()), kind=kind)


async def test_coroutine_functions_are_a_mistake():
    async def coroutine():
        """Never awaited here."""

    class Callable:
        async def __call__(self):
            """Never awaited here."""

    async with Executor() as executor:
        for fn in (coroutine, partial(coroutine), Callable()):
            with pytest.raises(TypeError, match="coroutine"):
                await executor.run(fn)
        for kind in ("inline", "thread"):
            with pytest.raises(TypeError, match="returned a coroutine"):
                await executor.run(lambda: coroutine(), kind=kind)


async def test_wrong_arguments():
    async with Executor() as executor:
        with pytest.raises(ValueError, match="kind is 'fast'"):
            await executor.run(int, kind="fast")
    for bad in ({"threads": 0}, {"processes": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            Executor(**bad)


async def test_threads_start_when_needed_and_only_so_many():
    gate = Gate()
    async with Executor(threads=3) as executor:
        for _ in range(5):
            await executor.run(int, kind="thread")
        assert executor.stats().threads == 1
        tasks = [asyncio.create_task(executor.run(gate.wait, n, kind="thread")) for n in range(6)]
        await until(lambda: executor.stats().threads_busy == 3)
        assert (executor.stats().threads, executor.stats().threads_waiting) == (3, 3)
        gate.event.set()
        assert await asyncio.gather(*tasks) == list(range(6))
        assert executor.stats().threads_busy == executor.stats().threads_waiting == 0


async def test_too_many_waiting_is_refused():
    gate = Gate()
    async with Executor(threads=1, max_waiting=2) as executor:
        tasks = [asyncio.create_task(executor.run(gate.wait, kind="thread")) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await executor.run(gate.wait, kind="thread")
        gate.event.set()
        await asyncio.gather(*tasks)


# ---- what it learns


def learnt(name="f"):
    return Profile(name)


def test_short_calls_in_a_row_bring_a_function_inline():
    profile = learnt()
    for _ in range(7):
        profile.ran_in_thread(5e-6, 5e-6, 100e-6)
    assert profile.kind == "thread"
    profile.ran_in_thread(5e-6, 5e-6, 100e-6)
    assert profile.kind == "inline"
    assert "8 calls in a row" in profile.why


@pytest.mark.parametrize(("wall", "cpu"), [(5e-3, 1e-6), (5e-6, 5e-3)])
def test_one_long_call_begins_the_row_again(wall, cpu):
    profile = learnt()
    for n in range(100):
        profile.ran_in_thread(wall if n % 7 == 0 else 5e-6, cpu if n % 7 == 0 else 5e-6, 100e-6)
    assert profile.kind == "thread"


def test_a_long_inline_call_sends_it_back_and_the_way_in_gets_longer():
    profile = learnt()
    for rows in (8, 32, 128):
        for n in range(rows):
            assert profile.kind == "thread", n
            profile.ran_in_thread(5e-6, 5e-6, 100e-6)
        assert profile.kind == "inline"
        profile.ran_inline(0.9e-3)
        assert profile.kind == "inline"
        profile.ran_inline(1.1e-3)
        assert profile.kind == "thread"
        assert "held the loop" in profile.why


async def test_auto_learns_from_real_calls_and_says_why():
    def short():
        return 1

    def long():
        time.sleep(0.003)

    async with Executor(threads=1) as executor:
        for _ in range(12):
            await executor.run(long)
        for _ in range(2000):
            await executor.run(short)
            functions = {name.rpartition(".")[2]: f for name, f in executor.stats().functions.items()}
            if functions["short"].kind == "inline":
                break
        assert functions["short"].kind == "inline"
        assert "in a row" in functions["short"].why
        assert functions["long"].kind == "thread"
        assert functions["long"].wall >= 0.003
        assert "a hop is worth it" in functions["long"].why


async def test_closures_and_bound_methods_share_what_is_learnt():
    class Model:
        def analyse(self, text):
            return text

    async with Executor(threads=1) as executor:
        for n in range(3):
            await executor.run(Model().analyse, n)
            await executor.run(lambda n=n: n)
        assert sorted(f.calls for f in executor.stats().functions.values()) == [3, 3]


async def kind_after(executor, fn, *args, calls=60):
    """Return where `auto` runs a function in the end, called one at a time; a busy machine makes it learn slower."""
    for _ in range(calls):
        await executor.run(fn, *args)
        found = executor.stats().functions[f"errands.{fn.__name__}"]
        if found.kind == "process":
            break
    return found


async def test_what_holds_the_interpreter_moves_to_a_process_and_says_why():
    async with Executor(threads=2, processes=1) as executor:
        found = await kind_after(executor, errands.holding, 8, calls=1000)
        assert (found.kind, "held the interpreter" in found.why) == ("process", True)
        assert await executor.run(errands.holding, 8) > 0
        assert executor.stats().processes == 1


async def test_what_lets_others_run_stays_in_a_thread():
    async with Executor(threads=2, processes=1) as executor:
        assert (await kind_after(executor, errands.releasing, bytes(16 << 20), calls=12)).kind == "thread"
        assert executor.stats().processes == 0


async def test_what_cannot_be_sent_stays_in_a_thread():
    async with Executor(threads=2, processes=1) as executor:
        found = await kind_after(executor, errands.locked, 8)
        assert (found.kind, "cannot be pickled" in found.why) == ("thread", True)


def test_a_closure_or_a_method_never_moves():
    assert known_by_name(errands.holding)
    for fn in (lambda: 1, errands.KEPT.append, partial(errands.holding, 8), print, int):
        assert not known_by_name(fn)


def test_a_process_whose_way_costs_more_than_it_saves_is_left_again():
    profile = Profile("f", movable=True)
    profile.ran_in_thread(10e-3, 10e-3, 100e-6)
    for rows in (4, 16):
        for n in range(rows):
            assert profile.may_move, n
            assert profile.worth_a_process(10e-3, 10e-3, 0.9)
            profile.could_move(10e-3, 1e-3)
        assert profile.kind == "process"
        profile.ran_in_process(10e-3, 2e-3)
        assert profile.kind == "process"
        for _ in range(60):
            profile.ran_in_process(10e-3, 9e-3)
        assert (profile.kind, "the way to a process" in profile.why) == ("thread", True)


@pytest.mark.parametrize(
    ("wall", "cpu", "held", "copying"),
    [(4e-3, 4e-3, 0.9, 0.0), (10e-3, 4e-3, 0.9, 0.0), (10e-3, 10e-3, 0.4, 0.0), (10e-3, 10e-3, 0.9, 3e-3)],
)
def test_one_call_that_was_not_worth_a_process_begins_the_row_again(wall, cpu, held, copying):
    profile = Profile("f", movable=True)
    for n in range(50):
        case = (wall, cpu, held, copying) if n % 4 == 3 else (10e-3, 10e-3, 0.9, 0.0)
        if profile.worth_a_process(*case[:3]):
            profile.could_move(case[0], case[3])
    assert profile.kind == "thread"


async def test_the_number_of_threads_and_processes_can_change_while_they_work():
    async with Executor(threads=2, processes=1) as executor:
        for size in (6, 1, 3, 1, 8):
            executor.resize(threads=size, processes=min(size, 2))
            gate = Gate()
            tasks = [asyncio.create_task(executor.run(gate.wait, n, kind="thread")) for n in range(12)]
            await until(lambda size=size: executor.stats().threads_busy == executor.stats().threads == size)
            gate.event.set()
            assert await asyncio.gather(*tasks) == list(range(12))
        for bad in ({"threads": 0}, {"processes": 0}):
            with pytest.raises(ValueError, match="at least 1"):
                executor.resize(**bad)


# ---- time, cancellation, end


async def test_after_a_timeout_the_slot_stays_busy_until_the_function_ends():
    gate = Gate()
    async with Executor(threads=1) as executor:
        with pytest.raises(DeadlineExceeded):
            await executor.run(gate.wait, timeout=0.005)
        assert executor.stats().threads_busy == 1
        queued = asyncio.create_task(executor.run(int, kind="thread"))
        with pytest.raises(DeadlineExceeded):
            await executor.run(int, timeout=0.005, kind="thread")  # its turn never came
        gate.event.set()
        assert await queued == 0
        assert executor.stats().threads_busy == 0


async def test_cancelling_callers_leaks_no_slot():
    rng = random.Random(2)
    done = []
    async with Executor(threads=3) as executor:
        tasks = []
        for n in range(1500):
            tasks.append(asyncio.create_task(executor.run(done.append, n, kind="thread")))
            if rng.random() < 0.5:
                rng.choice(tasks[-10:]).cancel()
            if rng.random() < 0.2:
                await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)
        for _ in range(3):
            await executor.run(int, kind="thread")
        await until(lambda: executor.stats().threads_waiting == executor.stats().threads_busy == 0)
        kept = {n for n, task in enumerate(tasks) if not task.cancelled()}
        assert kept <= set(done)
        assert len(done) == len(set(done))


async def test_close_fails_what_waits_and_what_does_not_end():
    gate = Gate()
    executor = Executor(threads=1, grace=0.01)
    tasks = [asyncio.create_task(executor.run(gate.wait, kind="thread")) for _ in range(3)]
    await until(lambda: executor.stats().threads_busy == 1)
    await executor.close()
    assert [type(e) for e in await asyncio.gather(*tasks, return_exceptions=True)] == [Closed] * 3
    with pytest.raises(Closed):
        await executor.run(int)
    gate.event.set()
    for thread in threading.enumerate():
        if thread.name.startswith("whisper-fast-thread"):
            assert thread.daemon
            thread.join(5)
    await executor.close()


async def test_close_waits_for_what_ends():
    gate = Gate()
    executor = Executor(threads=2)
    task = asyncio.create_task(executor.run(gate.wait, 7, kind="thread"))
    await until(lambda: executor.stats().threads_busy == 1)
    threading.Timer(0.01, gate.event.set).start()
    await executor.close()
    assert await task == 7


async def test_close_leaves_no_descriptor_open():
    async with Executor(threads=2, processes=1) as executor:
        await executor.run(int, kind="thread")
    before = len(os.listdir("/dev/fd"))
    for _ in range(5):
        async with Executor(threads=2, processes=1) as executor:
            await executor.run(int, kind="thread")
    assert len(os.listdir("/dev/fd")) <= before


async def test_a_thread_that_is_left_behind_rings_for_nobody():
    """Its descriptor stays open until then, so that it cannot write into a file that was opened since."""
    release = threading.Event()
    executor = Executor(threads=1, processes=1, grace=0.01)
    hanging = asyncio.create_task(executor.run(release.wait, kind="thread"))
    await until(lambda: executor.stats().threads_busy == 1)
    thread = next(t for t in threading.enumerate() if t.name.startswith("whisper-fast-thread"))
    bell = executor._threads._bell
    await executor.close()
    with pytest.raises(Closed):
        await hanging
    assert os.fstat(bell[1])
    release.set()
    thread.join(10)
    assert not thread.is_alive()
    for end in set(bell):
        os.close(end)


def test_one_executor_serves_one_loop_after_the_other():
    executor = Executor(threads=1)

    async def use():
        assert await executor.run(pow, 2, 3, kind="thread") == 8

    asyncio.run(use())
    asyncio.run(use())

    async def close():
        await use()
        await executor.close()

    asyncio.run(close())


# ---- processes


async def test_a_worker_that_dies_is_an_error_and_is_replaced():
    async with Executor(threads=1, processes=1) as executor:
        before = await executor.run(os.getpid, kind="process")
        with pytest.raises(WorkerDied):
            await executor.run(signal.raise_signal, signal.SIGKILL, kind="process")
        assert await executor.run(os.getpid, kind="process") != before
        os.kill(await executor.run(os.getpid, kind="process"), signal.SIGKILL)  # while it is idle
        await until(lambda: not executor.stats().processes_outstanding)
        for _ in range(50):
            try:
                assert await executor.run(pow, 2, 2, kind="process") == 4
                break
            except WorkerDied:
                continue  # the pool had not noticed yet
        assert executor.stats().worker_deaths >= 2


class CannotArrive:
    """Its import, so to say, fails in the worker."""

    def __call__(self):
        """Never called."""

    def __reduce__(self):
        return divmod, (1, 0)


async def test_process_errors_reach_the_caller():
    async with Executor(threads=1, processes=1) as executor:
        with pytest.raises(ValueError, match="invalid literal"):
            await executor.run(int, "x", kind="process")
        with pytest.raises((AttributeError, pickle.PicklingError), match="pickle"):
            await executor.run(lambda: 1, kind="process")
        with pytest.raises(ZeroDivisionError):
            await executor.run(CannotArrive(), kind="process")
        with pytest.raises(DeadlineExceeded):
            await executor.run(time.sleep, 0.05, kind="process", timeout=0.01)
        assert executor.stats().worker_deaths == 0
        assert await executor.run(pow, 2, 3, kind="process") == 8


async def test_close_kills_workers_that_do_not_end():
    executor = Executor(threads=1, processes=1, grace=0.05)
    await executor.run(os.getpid, kind="process")
    task = asyncio.create_task(executor.run(time.sleep, 60, kind="process"))
    waiting = [asyncio.create_task(executor.run(time.sleep, 61, kind="process")) for _ in range(3)]
    await until(lambda: executor.stats().processes_outstanding == 4)
    await executor.close()
    results = await asyncio.gather(task, *waiting, return_exceptions=True)
    assert {type(result) for result in results} == {Closed}


PARENT = """
    import asyncio, os, sys, time
    from whisper_fast.executor import Executor

    async def main():
        executor = Executor(threads=1, processes=2)
        pids = {await executor.run(os.getpid, kind="process")}
        pending = [asyncio.create_task(executor.run(time.sleep, 60, kind="process")) for _ in range(2)]
        await asyncio.sleep(0.3)
        print(*pids, flush=True)
        await asyncio.sleep(60)

    if __name__ == "__main__":
        asyncio.run(main())
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT))
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline().strip()
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) >= 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
