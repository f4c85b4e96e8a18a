"""Worker processes: what one death costs, what is tried again, and what is left at the end."""

from __future__ import annotations

import asyncio
import multiprocessing.resource_tracker
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import psutil
import pytest
from errands import die, drawn, hold, keep, kept, odd, scaled, zeros

from whisper_fast.errors import Closed, DeadlineExceeded, Overloaded, WorkerDied
from whisper_fast.executor import Executor
from whisper_fast.processes import Processes


@pytest.fixture(autouse=True, scope="module")
def tracker():
    """Python's own resource tracker lives as long as the interpreter; start it before any test counts processes."""
    multiprocessing.resource_tracker.ensure_running()


@pytest.fixture
async def workers():
    made = []

    def make(size=2, *, memory=1 << 40, max_waiting=10_000):
        made.append(Processes(size, memory=memory, max_waiting=max_waiting))
        return made[-1]

    yield make
    for processes in made:
        await processes.close(5.0)
        assert processes.started == processes.outstanding == 0


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def kill_one(processes, rng):
    """Kill any worker, from outside; return whether there was one."""
    for link in rng.sample(sorted(processes._links, key=id), min(1, len(processes._links))):
        with suppress(ProcessLookupError):
            os.kill(link.pid, signal.SIGKILL)
            return True
    return False


async def run(processes, fn, *args, idempotent=False):
    return await processes.submit(fn, args, idempotent=idempotent).future


# ---- results and errors


@pytest.mark.parametrize(
    "value",
    [None, "x" * 100_000, b"y" * 5_000_000, {"a": [1, 2.5]}, np.arange(6).reshape(2, 3)[:, ::2], list(range(50_000))],
)
async def test_values_of_every_size_come_back_as_they_went(workers, value):
    processes = workers(1)
    for _ in range(3):
        np.testing.assert_equal(await run(processes, max, (0, value), (1, value)), (1, value))


async def test_errors_say_where_they_came_from(workers):
    processes = workers(1)
    with pytest.raises(ValueError, match="invalid literal") as found:
        await run(processes, int, "x")
    assert "in a worker process:\nTraceback" in found.value.__notes__[0]
    with pytest.raises(RuntimeError, match="Odd: 1 and 2"):
        await run(processes, odd)
    with pytest.raises(SystemExit):
        await run(processes, sys.exit, 3)
    assert await run(processes, pow, 2, 3) == 8
    assert processes.deaths == 0


async def test_workers_draw_different_numbers(workers):
    processes = workers(3)
    found = await asyncio.gather(*(run(processes, drawn) for _ in range(12)))
    assert len({number for numbers in found for number in numbers}) == 36


# ---- arrays


async def test_an_array_is_written_again_only_when_nobody_looks_at_it(workers):
    processes = workers(1)
    for n in range(1, 6):
        assert await run(processes, keep, np.full(100_000, float(n))) == n
    assert await run(processes, kept) == [100_000.0 * n for n in range(1, 6)]


async def test_results_stay_right_while_they_are_held(workers):
    processes = workers(2)
    rng = random.Random(3)
    held = {}
    for n in range(120):
        held[n] = await run(processes, scaled, np.full(rng.randrange(1000, 90_000), n, np.int32))
        for gone in rng.sample(sorted(held), len(held) // 2):
            array = held.pop(gone)
            assert (array == 2 * gone).all()
            assert array.flags.writeable
            assert not array.ctypes.data % 64
    await processes.close(5.0)
    for n, array in held.items():
        assert (array == 2 * n).all()


async def test_what_an_arena_held_is_given_back(workers):
    processes = workers(1)
    for _ in range(2):
        assert (await run(processes, zeros, 150 << 20)).nbytes == 150 << 20
        await run(processes, scaled, np.zeros(150 << 20, np.uint8))
        await run(processes, int)  # carries home what is no longer looked at
    (link,) = processes._links
    assert link.outbox.nbytes < 1 << 20


@pytest.mark.soak
async def test_a_result_of_a_gigabyte(workers):
    assert (await run(workers(1), zeros, 1 << 30)).nbytes == 1 << 30


# ---- deaths


async def test_a_death_costs_the_call_that_ran_and_no_other(workers, tmp_path):
    processes = workers(2)
    victim = processes.submit(hold, (tmp_path / "pid",))
    others = [processes.submit(pow, (n, 2)) for n in range(1000)]
    await until((tmp_path / "pid").exists)
    await until(lambda: (tmp_path / "pid").read_text())
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    with pytest.raises(WorkerDied):
        await victim.future
    assert await asyncio.gather(*(call.future for call in others)) == [n * n for n in range(1000)]
    assert processes.deaths == 1
    await until(lambda: processes.started == 2 or not processes.waiting)


async def test_an_idempotent_call_is_done_once_more(workers, tmp_path):
    processes = workers(1)
    assert await run(processes, die, tmp_path / "a", idempotent=True) == 1
    with pytest.raises(WorkerDied):
        await run(processes, die, tmp_path / "b")
    assert (tmp_path / "b").read_text() == "+"


@pytest.mark.parametrize("idempotent", [True, False])
async def test_an_item_that_has_killed_two_workers_is_refused(workers, tmp_path, idempotent):
    processes = workers(1)
    for _ in range(1 if idempotent else 2):
        with pytest.raises(WorkerDied):
            await run(processes, die, tmp_path / "a", 100, idempotent=idempotent)
    assert processes.deaths == 2
    assert processes.quarantined == 1
    with pytest.raises(WorkerDied, match="has killed 2"):
        processes.submit(die, (tmp_path / "a", 100))
    assert (tmp_path / "a").read_text() == "++"
    assert await run(processes, die, tmp_path / "other", 0) == 0


async def test_a_worker_killed_while_idle_costs_nothing(workers):
    processes = workers(1)
    for _ in range(20):
        pid = await run(processes, os.getpid)
        os.kill(pid, signal.SIGKILL)
        assert await run(processes, pow, 2, 2) == 4  # handed to the dead one, not begun, done by the next
    assert processes.deaths >= 19


async def test_kills_at_random_moments_lose_nothing(workers):
    processes = workers(2)
    rng = random.Random(5)
    calls = [processes.submit(pow, (n, 2), idempotent=True) for n in range(2000)]
    killed = 0
    while killed < 60 and not all(call.future.done() for call in calls):
        await asyncio.sleep(rng.random() * 0.004)
        killed += kill_one(processes, rng)
    found = await asyncio.gather(*(call.future for call in calls), return_exceptions=True)
    wrong = [(n, value) for n, value in enumerate(found) if value != n * n and not isinstance(value, WorkerDied)]
    assert not wrong
    assert sum(isinstance(value, WorkerDied) for value in found) <= killed // 2


@pytest.mark.soak
async def test_ten_thousand_kills_and_no_hang(workers):
    processes = workers(2)
    rng = random.Random(7)
    for killed in range(10_000):
        calls = [processes.submit(pow, (20 * killed + n, 2), idempotent=True) for n in range(20)]
        await asyncio.sleep(rng.random() * 0.002)
        kill_one(processes, rng)
        found = await asyncio.wait_for(asyncio.gather(*(c.future for c in calls), return_exceptions=True), 30)
        assert {type(value) for value in found} <= {int, WorkerDied}, killed


async def test_a_dead_nursery_is_replaced(workers):
    processes = workers(2)
    os.kill(await run(processes, os.getppid), signal.SIGKILL)
    await until(lambda: not processes.started)
    assert await asyncio.gather(*(run(processes, pow, n, 2) for n in range(8))) == [n * n for n in range(8)]


PROGRAM = """
import asyncio, sys
from whisper_fast.executor import Executor

print("began", flush=True)

def double(n):
    return 2 * n

async def main():
    async with Executor(threads=1, processes=1) as executor:
        executor.warm()
        while not executor.stats().processes:
            await asyncio.sleep(0.001)
        print(await executor.run(double if "ours" in sys.argv else abs, -3, kind="process"))

if "unguarded" in sys.argv or __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("words", "printed"),
    [(["unguarded"], ["began", "3"]), (["ours"], ["began", "began", "-6"]), ([], ["began", "3"])],
)
def test_a_program_is_imported_by_workers_only_for_what_it_defines(tmp_path, words, printed):
    (tmp_path / "program.py").write_text(PROGRAM)
    ran = subprocess.run(
        [sys.executable, "program.py", *words], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert (ran.stdout.split(), ran.stderr) == (printed, "")


# ---- limits


async def test_a_timeout_kills_the_worker_that_exceeds_it():
    async with Executor(threads=1, processes=1) as executor:
        first = await executor.run(os.getpid, kind="process")
        with pytest.raises(DeadlineExceeded):
            await executor.run(time.sleep, 60, kind="process", timeout=0.02)
        assert await executor.run(os.getpid, kind="process") != first
        assert not psutil.pid_exists(first)
        assert executor.stats().worker_deaths == 0
        assert executor.stats().workers_killed == 1


async def test_what_waits_beyond_its_timeout_never_starts(tmp_path):
    async with Executor(threads=1, processes=1) as executor:
        assert await executor.run(pow, 2, 2, kind="process") == 4  # there is a worker, however long it took to start
        holding = asyncio.create_task(executor.run(hold, tmp_path / "pid", kind="process", timeout=0.5))
        await until((tmp_path / "pid").exists)
        with pytest.raises(DeadlineExceeded):
            await executor.run(die, tmp_path / "never", kind="process", timeout=0.01)
        with pytest.raises(DeadlineExceeded):
            await holding
        assert await executor.run(pow, 3, 2, kind="process") == 9
        assert not (tmp_path / "never").exists()


async def test_a_worker_that_held_too_much_is_replaced_between_calls(workers):
    processes = workers(1, memory=400 << 20)
    first = await run(processes, os.getpid)
    assert await run(processes, os.getpid) == first
    assert (await run(processes, zeros, 450 << 20)).nbytes == 450 << 20
    assert await run(processes, os.getpid) != first
    assert processes.recycled == 1


async def test_too_many_waiting_are_refused(workers, tmp_path):
    processes = workers(1, max_waiting=3)
    holding = processes.submit(hold, (tmp_path / "pid",))
    await until((tmp_path / "pid").exists)
    calls = [processes.submit(pow, (2, 2)) for _ in range(3)]
    with pytest.raises(Overloaded, match="3 calls wait"):
        processes.submit(pow, (2, 2))
    processes.expire(holding)
    assert await asyncio.gather(*(call.future for call in calls)) == [4, 4, 4]


async def test_the_number_of_workers_follows_its_size(workers):
    processes = workers(1)
    processes.warm()
    await until(lambda: processes.started == 1)
    processes.resize(4)
    processes.warm()
    await until(lambda: processes.started == 4)
    calls = [processes.submit(time.sleep, (0.05,)) for _ in range(4)]
    await asyncio.sleep(0)
    processes.resize(2)
    await asyncio.gather(*(call.future for call in calls))
    await until(lambda: processes.started == 2)
    assert processes.deaths == 0


async def test_cancelled_callers_leave_no_worker_taken(workers):
    processes = workers(2)
    rng = random.Random(11)
    tasks = []
    for n in range(800):
        tasks.append(asyncio.create_task(run(processes, pow, n, 2)))
        if rng.random() < 0.5:
            rng.choice(tasks[-20:]).cancel()
        if rng.random() < 0.3:
            await asyncio.sleep(0)
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(value == n * n for n, value in enumerate(found) if not isinstance(value, asyncio.CancelledError))
    await until(lambda: not processes.outstanding)


@pytest.mark.parametrize("moment", range(4))
async def test_closing_at_any_moment_leaves_nothing(workers, moment, tmp_path):
    processes = workers(2)
    calls = [processes.submit(hold, (tmp_path / str(n),)) for n in range(4)]
    if moment == 1:
        await asyncio.sleep(0)
    if moment == 2:
        await until(lambda: processes.started)
    if moment == 3:
        await until((tmp_path / "0").exists)
    await processes.close(0.01)
    found = await asyncio.gather(*(call.future for call in calls), return_exceptions=True)
    assert {type(error) for error in found} == {Closed}
    with pytest.raises(Closed):
        processes.submit(int, ())
