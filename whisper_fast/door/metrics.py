"""`/metrics`: the engine's and the door's counters in Prometheus' text formats."""

from __future__ import annotations

from collections import Counter, defaultdict
from time import perf_counter
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from prometheus_client.core import Metric
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .._metrics import Counters, Histogram, Histograms
    from ..monitor import LoopWatch, Record

__all__ = ["Metered", "Requests", "exposition", "registry"]

COUNTERS = {
    "accepted": "Messages accepted: stored and to be answered.",
    "answered": "Messages answered.",
    "failed": "Messages whose answer failed.",
    "lost": "Replies whose message was not in the journal any more: must stay 0.",
    "doubled": "Replies to a message that had one already, which nobody got: must stay 0.",
    "duplicates": "Deliveries of a message that had been accepted before.",
    "shed": "Messages refused because the engine was full.",
    "partial": "Answers that went out without some component.",
    "commits": "Transactions written to the disk.",
    "writes": "Writes, of which many share a transaction.",
    "llm_calls": "Attempts to reach a language model.",
    "llm_retries": "Attempts made because an earlier one had failed.",
    "llm_retries_denied": "Retries that the budget for them did not allow.",
    "llm_hedges": "Second attempts of calls that took long.",
    "llm_hedges_won": "Second attempts that answered first.",
    "llm_tokens_prompt_tokens": "Tokens sent to models.",
    "llm_tokens_completion_tokens": "Tokens that models wrote, also those of answers that were given up.",
    "llm_tokens_estimated_tokens": "The part of both that the server did not count.",
    "llm_coalesced": "Calls answered by an equal call under way.",
    "memory_hits": "Recalls that found the user's memories resident.",
    "memory_misses": "Recalls that had to wait for the user's memories.",
    "memory_loads": "Users whose memories were read from the disk.",
    "memory_evictions": "Users whose memories were dropped to stay within the budget.",
    "conversation_hits": "Turns that found the recent conversation in memory.",
    "conversation_misses": "Turns that had to wait for the recent conversation.",
    "conversation_loads": "Conversations that were read.",
    "conversation_evictions": "Conversations that were dropped to stay within the budget.",
    "preload_visits": "Visits: messages after a time without any of that user.",
    "preload_loads": "Users who were loaded for before they returned.",
    "preload_right": "Loads whose user returned in time.",
    "preload_wrong": "Loads whose user did not.",
    "preload_denied": "Loads that the budget or the flag did not allow.",
    "batchers_embedding_items": "Texts embedded.",
    "batchers_embedding_batches": "Batches of texts.",
    "batchers_embedding_calls": "Calls of the embedder.",
    "batchers_embedding_full": "Batches that went because they were full.",
    "batchers_embedding_cost": "Batches that went because one more text would have been too much.",
    "batchers_embedding_idle": "Batches that went because none was running.",
    "batchers_embedding_linger": "Batches that went because a text had waited long enough.",
    "batchers_embedding_direct": "Texts that were embedded alone because batching was off.",
    "adaptation_moves": "Changes of pool sizes and lingers that stayed.",
    "budget_changes": "Changes that the memory budget made to caches, and to whether messages are taken.",
    "loop_beats": "Beats of the watch on the event loop.",
    "loop_blocked": "Times that the event loop was found held for more than 50 ms; from 90 ms on without fail.",
    "loop_pauses": "Times that the whole process stood still: suspended, or given no processor.",
    "redis_reads": "Places that were asked for in Redis.",
    "redis_late": "Answers of Redis that nobody waited for.",
    "redis_pushes": "Turns that were told to other engines.",
    "redis_news": "Changes that other engines told.",
    "redis_joins": "Times that Redis was joined.",
    "redis_refused": "Records in Redis that were not whole, or another user's.",
}
"""The entries of `Engine.stats()` that only ever grow; every other number in it is a gauge."""

ENDPOINT = {
    "in_flight": "Calls at an endpoint.",
    "limit": "Calls that it gets at most at once.",
    "waiting": "Calls that wait for it.",
    "oldest_waiting": "Seconds that the oldest of them has waited.",
    "latency": "Mean seconds until an answer.",
    "first_token": "Mean seconds until the first token of a stream.",
    "shut": "1 while it is left alone because it keeps failing.",
}
"""The gauges of each endpoint."""

FLAG = {
    "on": "1 for an optimisation that is on.",
    "changes": "How often it was switched.",
    "failures": "How often it raised, so that the plain way was taken.",
}
"""What is told of each flag."""

LABELS = frozenset({"errors", "flags", "refused"})
"""The entries of the counters that are labels, not paths."""

SECONDS = tuple(2.0**power for power in range(-12, 8))
"""The upper bounds of the exposed buckets: powers of two from 0.24 ms to 128 s, at which our counts are exact."""


class Requests:
    """What the door counts: requests and the seconds spent on them, by route, method and status."""

    def __init__(self) -> None:
        self.count: Counter[tuple[str, str, str]] = Counter()
        self.seconds: defaultdict[tuple[str, str, str], float] = defaultdict(float)
        self.in_flight = 0


class Metered:
    """ASGI middleware that counts requests; a path that is no route of ours counts as `other`."""

    def __init__(self, app: ASGIApp, requests: Requests, paths: frozenset[str]) -> None:
        self._app = app
        self._requests = requests
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and count what became of it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = 500

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        begun = perf_counter()
        self._requests.in_flight += 1
        try:
            await self._app(scope, receive, watched)
        finally:
            self._requests.in_flight -= 1
            route = scope["path"] if scope["path"] in self._paths else "other"
            method = scope["method"] if scope["method"] in {"GET", "POST", "HEAD"} else "other"
            key = (route, method, str(status))
            self._requests.count[key] += 1
            self._requests.seconds[key] += perf_counter() - begun


class Exporter(Collector):
    """Reads all counters anew for each scrape; nothing is registered per user, so no label can name one."""

    def __init__(
        self, stats: Callable[[], Mapping[str, Any]], requests: Requests, record: Record | None = None
    ) -> None:
        self._stats = stats
        self._requests = requests
        self._record = record

    def collect(self) -> Iterator[Metric]:
        """Yield every metric family."""
        stats = self._stats()
        for path, value in leaves(stats):
            if path in COUNTERS:
                yield CounterMetricFamily(f"whisper_fast_{path}", COUNTERS[path], value)
            else:
                yield GaugeMetricFamily(f"whisper_fast_{path}", f"Engine.stats(): {path}.", value)
        errors = stats.get("llm", {}).get("errors", {})
        yield labelled("whisper_fast_llm_errors", "Failed attempts, by error.", "error", errors)
        refused = stats.get("refused", {})
        yield labelled("whisper_fast_refused", "Messages refused, by what was short.", "reason", refused)
        for key, what in FLAG.items():
            kind = GaugeMetricFamily if key == "on" else CounterMetricFamily
            metric = kind(f"whisper_fast_flag_{key}", what, labels=["flag"])
            for name, value in stats.get("flags", {}).get(key, {}).items():
                metric.add_metric([name], value)
            yield metric
        yield from endpoints(stats.get("llm", {}).get("endpoints", ()))
        if (record := self._record) is not None:
            yield histograms("whisper_fast_stage_seconds", "Seconds of each stage of a turn.", "stage", record.stages)
            what = "Seconds until the reply, and of them the language model's and ours."
            yield histograms("whisper_fast_reply_seconds", what, "part", record.replies)
            yield counters(
                "whisper_fast_missing", "Components that an answer went without.", "component", record.missing
            )
            yield counters("whisper_fast_turn_errors", "Errors that ended a turn for now.", "error", record.errors)
            yield from loop(record.loop)
        yield from self._door()

    def _door(self) -> Iterator[Metric]:
        labels = ["route", "method", "status"]
        count = CounterMetricFamily("whisper_fast_http_requests", "HTTP requests answered.", labels=labels)
        seconds = CounterMetricFamily("whisper_fast_http_request_seconds", "Seconds until answered.", labels=labels)
        for key, number in tuple(self._requests.count.items()):
            count.add_metric(key, number)
            seconds.add_metric(key, self._requests.seconds[key])
        yield count
        yield seconds
        yield GaugeMetricFamily("whisper_fast_http_in_flight", "HTTP requests under way.", self._requests.in_flight)


def labelled(name: str, what: str, label: str, numbers: Mapping[str, float]) -> Metric:
    metric = CounterMetricFamily(name, what, labels=[label])
    for value, number in numbers.items():
        metric.add_metric([value], number)
    return metric


def endpoints(found: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
    """Yield what is known of each language model; two of one name get a number each."""
    names = [f"{one['name']} {at}" if at else one["name"] for at, one in numbered(found)]
    for key, what in ENDPOINT.items():
        metric = GaugeMetricFamily(f"whisper_fast_llm_endpoint_{key}", what, labels=["endpoint"])
        for name, one in zip(names, found, strict=True):
            metric.add_metric([name], one["breaker"] != "closed" if key == "shut" else one[key])
        yield metric
    calls = CounterMetricFamily("whisper_fast_llm_endpoint_calls", "Attempts at an endpoint.", labels=["endpoint"])
    failed = CounterMetricFamily("whisper_fast_llm_endpoint_errors", "Failed ones.", labels=["endpoint", "error"])
    for name, one in zip(names, found, strict=True):
        calls.add_metric([name], one["calls"])
        for error, number in one["errors"].items():
            failed.add_metric([name, error], number)
    yield calls
    yield failed


def numbered(found: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield each with how many of its name stand before it."""
    seen: Counter[str] = Counter()
    for one in found:
        yield seen[one["name"]], one
        seen[one["name"]] += 1


def loop(watch: LoopWatch) -> Iterator[Metric]:
    lag = HistogramMetricFamily("whisper_fast_loop_lag_seconds", "Seconds by which the event loop was late.")
    lag.add_metric([], buckets(watch.lag), watch.lag.sum)
    yield lag
    what = "Times that a line was found to hold the event loop for more than 50 ms."
    yield counters("whisper_fast_loop_blocks", what, "line", watch.blocks)
    yield counters("whisper_fast_loop_blocked_seconds", "Seconds of it.", "line", watch.seconds)


def histograms(name: str, what: str, label: str, family: Histograms) -> Metric:
    metric = HistogramMetricFamily(name, what, labels=[label])
    for value, histogram in family.items():
        metric.add_metric([value], buckets(histogram), histogram.sum)
    return metric


def buckets(histogram: Histogram) -> list[tuple[str, float]]:
    below = [(str(bound), number) for bound, number in zip(SECONDS, histogram.below(SECONDS), strict=True)]
    return [*below, ("+Inf", histogram.count)]


def counters(name: str, what: str, label: str, family: Counters) -> Metric:
    metric = CounterMetricFamily(name, what, labels=[label])
    for value, counter in family.items():
        metric.add_metric([value], counter.value)
    return metric


def leaves(stats: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number in nested counters, its path joined by underscores; those of `LABELS` are none."""
    for name, value in stats.items():
        path = prefix + "".join(c if c.isalnum() and c.isascii() else "_" for c in str(name))
        if isinstance(value, (bool, int, float)):
            yield path, float(value)
        elif isinstance(value, dict) and name not in LABELS:
            yield from leaves(value, f"{path}_")


def registry(
    stats: Callable[[], Mapping[str, Any]], requests: Requests, record: Record | None = None
) -> CollectorRegistry:
    """Return what a scrape reads: the engine, the door and this process."""
    made = CollectorRegistry(auto_describe=False)
    made.register(Exporter(stats, requests, record))
    ProcessCollector(registry=made)
    return made


def exposition(source: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """Return the text and its content type, in the format that `accept` prefers."""
    encode, content_type = choose_encoder(accept)
    return encode(source), content_type
