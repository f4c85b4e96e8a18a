"""One run of load: the traffic is put on a target, and what comes of it is counted until the last reply.

A message's time counts from the moment it was due, not from the moment we came round to send it, so that neither a
stall of the target nor one of ours is left out of the figures (coordinated omission, as Tene calls it).
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ... import clock
from ...errors import SettingsError, WhisperFastError
from .. import audit, users
from ..pace import Pace
from .machine import Machine
from .tally import Tally

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...message import Message
    from ..traffic import Arrival, Arrivals, Traffic
    from .hdr import Hdr
    from .target import Target

__all__ = ["PERCENTS", "Patience", "Run", "Sample", "milliseconds"]

LOOK: Final = 0.25  # seconds between two looks
SAMPLES: Final = 240  # of a run, at most
SHORTEST: Final = 0.1  # seconds: over less, the processors' shares mean nothing
PERCENTS: Final = (50, 75, 90, 99, 99.9, 99.99)


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds that are waited after the last message was sent: `idle` of them without any reply, `whole` in all."""

    idle: float = 20.0
    whole: float = 120.0


class Sample(NamedTuple):
    """What was seen in one stretch of the run, which ends `at` seconds after the start; times in milliseconds."""

    at: float
    answered_per_s: float
    shed_per_s: float
    errors_per_s: float
    in_flight: int
    total_p50: float
    total_p99: float
    total_max: float
    added_p99: float
    rss_mb: float
    cores: list[float]


class Run:
    """Puts `arrivals` on a target. `figures` may be asked for at any moment; they are partial until `run` is over."""

    def __init__(
        self,
        traffic: Traffic,
        arrivals: Arrivals,
        target: Target,
        *,
        objective: float = 1.0,
        patience: Patience | None = None,
        words: Callable[[int, int], str] | None = None,
    ) -> None:
        if not objective > 0:
            raise SettingsError(f"objective is {objective}; more than 0 seconds are needed")
        self.traffic = traffic
        self.tally = Tally(objective)
        self.samples: list[Sample] = []
        self.partial = True
        self._arrivals = arrivals
        self._target = target
        self._patience = patience or Patience()
        self._words = words
        self._running: dict[asyncio.Task[None], tuple[Arrival, Message]] = {}
        self._empty: asyncio.Future[None] | None = None
        self._pace: Pace | None = None
        self._machine: Machine | None = None
        self._began = self._now = self._cpu = 0.0
        self._lost = 0
        self._duplicated: int | None = None
        self._sampled = 0.0

    async def run(self, show: Callable[[Run], object] = lambda run: None) -> None:
        """Send every message when it is due and wait for the last reply; `show` is called at each look.

        When it is cancelled, what was counted so far stays. Raises WhisperFastError for a target that does not open.
        """
        waiting = True
        try:
            async with self._target.open():
                try:
                    await self._drive(show)
                    waiting = await self._drain(show)
                finally:
                    await self._leave()
                    self._look(show, last=True)
        finally:
            if self.tally.sent:
                self._judge(waiting=waiting)
        self.partial = False

    def figures(self) -> dict[str, Any]:
        """Return everything that was counted and measured."""
        tally, wall = self.tally, max(self.tally.latest, 1e-9)
        turns = tally.answered
        return {
            "target": self._target.name,
            "partial": self.partial,
            "sent": tally.sent,
            "turns": turns,
            "turns_per_s": round(turns / wall, 2),
            "goodput_per_s": round(tally.good / wall, 2),
            "goodput_share": round(tally.good / tally.sent, 5) if tally.sent else None,
            "objective": {"seconds": tally.objective, "of": "added" if tally.added.count else "total"},
            "errors": tally.errors.total(),
            "errors_by_kind": dict(tally.errors),
            "shed": tally.shed.total(),
            "shed_by_kind": dict(tally.shed),
            "incomplete": tally.incomplete,
            "missing_by_component": dict(tally.missing),
            "unanswered": tally.unanswered,
            "lost": self._lost,
            "duplicated": self._duplicated,
            "out_of_order": tally.out_of_order,
            "in_flight_peak": tally.in_flight_peak,
            "added_ms": milliseconds(tally.added),
            "total_ms": milliseconds(tally.total),
            "sent_late_ms": self._late(),
            **self._taken(turns),
            "wall_seconds": round(self._now, 3),
            **asdict(self.traffic),
        }

    def histograms(self) -> dict[str, str]:
        """Return the times, added and total, as HdrHistogram's tools take them."""
        return {"added": self.tally.added.encoded(), "total": self.tally.total.encoded()}

    @property
    def broken(self) -> list[str]:
        """The figures that break a promise of the target."""
        found = {"lost": self._lost, "duplicated": self._duplicated, "out_of_order": self.tally.out_of_order}
        return [name for name in self._target.promises if found[name]]

    async def _drive(self, show: Callable[[Run], object]) -> None:
        self._machine = Machine()
        self._began = clock.monotonic()
        self._pace = Pace(self._arrivals, self._send, self._began)
        sending = asyncio.create_task(self._pace.run(), name="load:pace")
        try:
            while not sending.done():
                await asyncio.wait([sending], timeout=LOOK)
                self._look(show)
        finally:
            sending.cancel()  # harmless when it has ended
            await asyncio.wait([sending])
        await sending

    async def _drain(self, show: Callable[[Run], object]) -> bool:
        """Wait for the replies that are missing; returns whether they may still come."""
        begun = latest = clock.monotonic()
        ended = self.tally.ended
        while self._running and (now := clock.monotonic()) - latest < self._patience.idle:
            if now - begun >= self._patience.whole:
                return True
            await self._ended(min(LOOK, self._patience.idle))
            if self.tally.ended != ended:
                latest, ended = clock.monotonic(), self.tally.ended
            self._look(show)
        return False

    async def _ended(self, seconds: float) -> None:
        """Return when nothing runs any more, or after that many seconds."""
        self._empty = asyncio.get_running_loop().create_future()
        timer = asyncio.get_running_loop().call_later(seconds, finish, self._empty)
        try:
            await self._empty
        finally:
            timer.cancel()

    async def _leave(self) -> None:
        """Stop waiting for whatever is not answered yet; the time that it has taken so far counts."""
        left = dict(self._running)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)
        now = clock.monotonic() - self._began
        for task, (arrival, message) in left.items():
            if task.cancelled():
                self.tally.leave(arrival, now, self._target.model_seconds(message))

    def _send(self, arrival: Arrival) -> None:
        words = arrival.words or (self._words(arrival.user, arrival.number) if self._words else None)
        message = users.message(arrival.user, arrival.number, self.traffic.seed, words)
        self._target.expect(message, arrival)
        self.tally.begin()
        name = f"load:{arrival.user}-{arrival.number}"
        task = asyncio.get_running_loop().create_task(self._turn(arrival, message), name=name)
        self._running[task] = arrival, message
        task.add_done_callback(self._over)

    async def _turn(self, arrival: Arrival, message: Message) -> None:
        promise: int | None = None

        def accepted() -> None:
            nonlocal promise
            promise = self.tally.promise(arrival)

        try:
            missing = await self._target.answer(message, accepted)
        except WhisperFastError as error:
            self._target.model_seconds(message)
            self.tally.fail(promise, error)
        else:
            assert promise is not None, "what was answered had been promised"  # noqa: S101 - each target sees to it
            now = clock.monotonic() - self._began
            self.tally.answer(arrival, promise, now, self._target.model_seconds(message))
            self.tally.missing.update(missing)
            self.tally.incomplete += bool(missing)

    def _over(self, task: asyncio.Task[None]) -> None:
        arrival, _ = self._running.pop(task)
        if not self._running and self._empty is not None:
            finish(self._empty)
        if task.cancelled():
            self.tally.in_flight -= 1
            return
        self.tally.end(clock.monotonic() - self._began)
        if (error := task.exception()) is not None:  # none of ours: it is counted by its kind
            self.tally.fail(None, error)
        if self._pace is not None:
            self._pace.over(arrival.user)

    def _look(self, show: Callable[[Run], object], *, last: bool = False) -> None:
        if self._machine is None:
            return
        self._now = clock.monotonic() - self._began
        seen = self._machine.look()
        self._cpu = seen.cpu_seconds
        stretch = self._now - self._sampled
        if (last and stretch > SHORTEST) or stretch >= max(1.0, self.traffic.seconds / SAMPLES):
            self._sample(seen.rss, seen.cores)
        show(self)

    def _sample(self, rss: int, cores: list[float]) -> None:
        stretch, ended = self._now - self._sampled, self.tally.turn_over()
        self._sampled = self._now
        total, added = ended.total, ended.added
        self.samples.append(
            Sample(
                at=round(self._now, 3),
                answered_per_s=round(ended.answered / stretch, 2),
                shed_per_s=round(ended.shed / stretch, 2),
                errors_per_s=round(ended.errors / stretch, 2),
                in_flight=self.tally.in_flight,
                total_p50=round(total.quantile(0.5) * 1000, 3),
                total_p99=round(total.quantile(0.99) * 1000, 3),
                total_max=round(total.largest * 1000, 3),
                added_p99=round(added.quantile(0.99) * 1000, 3),
                rss_mb=round(rss / 1e6, 1),
                cores=[round(share, 3) for share in cores],
            )
        )

    def _judge(self, *, waiting: bool) -> None:
        """Hold what was promised against what the journal says; the target is closed."""
        folder = self._target.folder
        states = audit.states(folder) if folder is not None else None
        self._lost = self.tally.broken(self.traffic.seed, states, waiting=waiting)
        if folder is not None:
            self._duplicated = audit.duplicated(folder)

    def _late(self) -> dict[str, float]:
        if self._pace is None or not (late := self._pace.late).count:
            return {}
        return {"p50": round(late.quantile(0.5) * 1000, 3), "p99": round(late.quantile(0.99) * 1000, 3)}

    def _taken(self, turns: int) -> dict[str, Any]:
        machine = self._machine
        looks = max(1, machine.looks) if machine else 1
        return {
            "cpu_us_per_turn": round(self._cpu / turns * 1e6, 1) if turns else None,
            "turns_per_cpu_s": round(turns / self._cpu, 1) if self._cpu else None,
            "cpu_utilization": round(self._cpu / max(self._now, 1e-9) / (os.cpu_count() or 1), 4),
            "cores": [round(share / looks, 3) for share in machine.busy] if machine else [],
            "rss_peak_mb": round(machine.rss_peak / 1e6, 1) if machine else None,
        }


def finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def milliseconds(seen: Hdr) -> dict[str, float]:
    """Return the percentiles of seconds in milliseconds, as `p50`, `p999` (99.9), and the largest, if any."""
    if not seen.count:
        return {}
    found = {f"p{percent:g}".replace(".", ""): round(seen.quantile(percent / 100) * 1000, 3) for percent in PERCENTS}
    return {**found, "max": round(seen.largest * 1000, 3)}
