"""All components of one turn, together: each starts as soon as what it needs is there.

A component that finishes without suspending costs no task; a late one is cancelled at its deadline and its fallback
stands in; the turn goes on with what there is and names what is missing.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from itertools import islice
from typing import TYPE_CHECKING, Any

from . import clock
from ._eager import Eager
from .errors import SettingsError, described
from .flags import logged

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from .components import Component
    from .executor import Executor
    from .message import Turn

__all__ = ["Pipeline"]

log = logging.getLogger(__name__)

SEEN = 256  # turns that `gathering` looks at
STRAGGLER_SECONDS = 5.0  # how long close() waits for a component that ignores its cancellation


class Pipeline:
    """Runs the components of a turn; `parallel()` false runs the same ones in sequence, with the same answers.

    So does a turn in which running them together fails, with those that are not done yet; `failed` is then told.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        parallel: Callable[[], bool],
        failed: Callable[[str, Exception], None] = logged,
    ) -> None:
        self._executor = executor
        self._parallel = parallel
        self._failed = failed
        self._components: dict[str, Component] = {}
        self._independent: tuple[Component, ...] = ()
        self._dependents: dict[str, tuple[Component, ...]] = {}
        self._eager = Eager()
        self._stragglers: set[asyncio.Task[Any]] = set()
        self._fans: set[Fan] = set()  # of turns that wait for a component
        self._sequential: Counter[str] = Counter()  # turns that are at a component, one after the other

    @property
    def components(self) -> tuple[Component, ...]:
        """All components, each behind those that it needs."""
        return tuple(self._components.values())

    def gathering(self) -> dict[str, float]:
        """Return how many turns wait for each component; one that waits for several is shared among them.

        Of very many turns a part is looked at.
        """
        found: dict[str, float] = {name: float(turns) for name, turns in self._sequential.items() if turns}
        seen = list(islice(self._fans, SEEN))
        each = len(self._fans) / len(seen) if seen else 0.0
        for fan in seen:
            for component, _ in fan.running.values():
                found[component.name] = found.get(component.name, 0.0) + each / len(fan.running)
        return found

    def add(self, component: Component) -> None:
        """Add a component, or replace the one of that name. Raises SettingsError if it needs one that is missing."""
        components = {**self._components, component.name: component}
        if missing := sorted(set(component.needs) - components.keys()):
            raise SettingsError(f"component {component.name} needs {missing}; there are {sorted(self._components)}")
        try:
            order = TopologicalSorter({c.name: c.needs for c in components.values()}).static_order()
            self._components = {name: components[name] for name in order}
        except CycleError as error:
            raise SettingsError(f"component {component.name} needs itself: {' -> '.join(error.args[1])}") from None
        every = self._components.values()
        self._independent = tuple(c for c in every if not c.needs)
        self._dependents = {name: tuple(c for c in every if name in c.needs) for name in self._components}

    async def run(self, turn: Turn) -> None:
        """Fill `turn.values`, `turn.partial` and `turn.timings`; never raises for a component's sake."""
        if not self._parallel():
            await self._in_sequence(tuple(self._components.values()), turn)
            return
        fan = Fan(self, turn)
        try:
            fan.start(self._independent)
            if fan.running:
                await fan.rest()
        except Exception as error:  # noqa: BLE001 - not a component's: those end in `_fail`
            fan.stop()
            left = tuple(c for c in self._components.values() if c.name not in turn.values)
            await self._in_sequence(left, turn)
            self._failed("parallel", error)

    async def _in_sequence(self, components: Sequence[Component], turn: Turn) -> None:
        for component in components:
            self._sequential[component.name] += 1
            try:
                await self._alone(component, turn)
            finally:
                self._sequential[component.name] -= 1

    async def close(self) -> None:
        """End what is left of components that ignored their deadline."""
        await self._eager.close()
        for task in self._stragglers:
            task.cancel()
        if self._stragglers:
            _, deaf = await asyncio.wait(self._stragglers, timeout=STRAGGLER_SECONDS)
            for task in deaf:
                log.error("component task %s does not end, even cancelled", task.get_name())

    async def _alone(self, component: Component, turn: Turn) -> None:
        began = clock.monotonic()
        try:
            async with asyncio.timeout(component.deadline):
                value = await self._call(component, turn)
        except (Exception, asyncio.CancelledError) as error:  # a user's code: the turn goes on
            if being_cancelled():
                raise
            self._fail(component, turn, began, error)
        else:
            self._keep(component, turn, began, value)

    def _call(self, component: Component, turn: Turn) -> Coroutine[Any, Any, Any]:
        if component.asynchronous:
            return component.fn(turn)  # type: ignore[no-any-return]
        return self._blocking(component, turn)

    async def _blocking(self, component: Component, turn: Turn) -> Any:
        value = await self._executor.run(component.fn, turn, kind="thread")
        return await value if inspect.isawaitable(value) else value

    def _keep(self, component: Component, turn: Turn, began: float, value: Any) -> None:
        if component.check is not None:
            try:
                value = component.check(value)
            except Exception as error:  # noqa: BLE001 - a user's value: whatever is wrong with it, the turn goes on
                self._fail(component, turn, began, error)
                return
        turn.values[component.name] = value
        turn.took(component.name, began)

    def _fail(self, component: Component, turn: Turn, began: float, error: BaseException | None) -> None:
        turn.values[component.name] = component.fallback
        turn.partial.append(component.name)
        turn.took(component.name, began)
        late = error is None or isinstance(error, TimeoutError)
        why = f"not done after {component.deadline} s" if error is None or late else described(error)
        log.warning("message %s: component %s is missing: %s", turn.message.id, component.name, why)

    def _abandon(self, task: asyncio.Task[Any]) -> None:
        """Cancel a task and keep it until it has ended, without waiting for it."""
        task.cancel()
        self._stragglers.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._stragglers.discard(task)
        if not task.cancelled():
            task.exception()  # seen: what a component says after its deadline no longer matters


def being_cancelled() -> bool:
    """Say whether the turn itself is being cancelled, as against a component that says it was."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class Fan:
    """The running components of one turn, and the one timer that watches their deadlines.

    The timer stands at the earliest deadline seen so far. A component that finishes does not move it: if it goes
    off with nobody late, it is set to what is then the earliest.
    """

    __slots__ = ("done", "due", "pipeline", "running", "timer", "turn")

    def __init__(self, pipeline: Pipeline, turn: Turn) -> None:
        self.pipeline = pipeline
        self.turn = turn
        self.running: dict[asyncio.Task[Any], tuple[Component, float]] = {}
        self.done: asyncio.Future[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.due = float("inf")

    def start(self, components: Sequence[Component]) -> None:
        """Run the first step of each component, and of those that needed what is then there."""
        pipeline, turn = self.pipeline, self.turn
        for component in components:
            began = clock.monotonic()
            try:
                value, task = pipeline._eager.start(pipeline._call(component, turn), component.name)
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - a user's code: the turn goes on
                pipeline._fail(component, turn, began, error)
            else:
                if task is not None:
                    self.watch(task, component, began)
                    continue
                pipeline._keep(component, turn, began, value)
            self.follow(component)

    def follow(self, component: Component) -> None:
        values = self.turn.values
        for dependent in self.pipeline._dependents[component.name]:
            if all(need in values for need in dependent.needs):
                self.start((dependent,))

    def watch(self, task: asyncio.Task[Any], component: Component, began: float) -> None:
        self.running[task] = component, began
        task.add_done_callback(self.finished)
        if began + component.deadline < self.due:
            self.due = began + component.deadline
            if self.done is not None:
                self.set_timer()

    async def rest(self) -> None:
        """Wait until every component has finished or is past its deadline."""
        self.done = asyncio.get_running_loop().create_future()
        self.set_timer()
        self.pipeline._fans.add(self)
        try:
            await self.done
        finally:
            self.stop()

    def stop(self) -> None:
        """Let go of what still runs: the turn itself was cancelled, or something here has failed."""
        self.pipeline._fans.discard(self)
        if self.timer is not None:
            self.timer.cancel()
        for task in self.running:
            task.remove_done_callback(self.finished)
            self.pipeline._abandon(task)
        self.running.clear()

    def finished(self, task: asyncio.Task[Any]) -> None:
        component, began = self.running.pop(task)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        try:
            if error is None:
                self.pipeline._keep(component, self.turn, began, task.result())
            else:
                self.pipeline._fail(component, self.turn, began, error)
            self.go_on(component)
        except Exception as fault:  # noqa: BLE001 - told to `rest`: the loop alone would hear of it, and the turn hang
            self.broke(fault)

    def broke(self, fault: Exception) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_exception(fault)

    def go_on(self, component: Component) -> None:
        self.follow(component)
        if not self.running and self.done is not None and not self.done.done():
            self.done.set_result(None)

    def set_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.timer = asyncio.get_running_loop().call_later(max(0.0, self.due - clock.monotonic()), self.expire)

    def expire(self) -> None:
        try:
            self.end_late()
        except Exception as fault:  # noqa: BLE001 - as above
            self.broke(fault)

    def end_late(self) -> None:
        now = clock.monotonic()
        due = [(task, c, began) for task, (c, began) in self.running.items() if c.deadline + began <= now]
        for task, component, began in due:
            if task.done():  # in time after all: its callback is on the loop's list already
                continue
            del self.running[task]
            task.remove_done_callback(self.finished)
            self.pipeline._abandon(task)
            self.pipeline._fail(component, self.turn, began, None)
            self.go_on(component)
        still = [component.deadline + began for task, (component, began) in self.running.items() if not task.done()]
        if still:
            self.due = min(still)
            self.set_timer()
