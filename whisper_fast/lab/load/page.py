"""The report of a run as one HTML page that needs nothing else: figures, plots, and the whole as JSON inside it."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from datetime import UTC, datetime
from html import escape
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from ... import clock
from ...errors import SettingsError, StoreError
from .plot import STYLE, Line, linear, logarithmic, plot

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from .hdr import Hdr
    from .run import Run, Sample

__all__ = ["checked", "page", "write"]

POINTS: Final = 400  # of a percentile curve
LOWEST: Final = 0.01  # milliseconds: a logarithm has no 0
CSS: Final = (
    ":root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:1480px;margin:2em auto;"
    "padding:0 1em}h1{font-size:1.4em}h2{font-size:1.05em;margin:.2em 0}table{border-collapse:collapse}"
    "td{padding:.1em 1.2em .1em 0;vertical-align:top}td+td{font-variant-numeric:tabular-nums}"
    ".plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(560px,100%),1fr));gap:1.2em 2em;"
    "margin:1em 0}.partial{border:2px solid #dc2626;padding:.4em 1em}pre{white-space:pre-wrap}"
)


def checked(path: Path) -> Path:
    """Return the path; raises SettingsError, before anything is measured, where no file could be written."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise SettingsError(f"the report {str(path)!r:.200} cannot be written: there is no such folder, or it is one")
    return path


def write(run: Run, path: Path, command: str) -> None:
    """Write the page. Raises StoreError when the file cannot be written."""
    try:
        path.write_text(page(run, command), encoding="utf-8")
    except OSError as error:
        raise StoreError(f"the report {str(path)!r:.200} cannot be written: {error.strerror}") from None


def page(run: Run, command: str) -> str:
    """Return the page of a run; `command` is what runs it again."""
    figures = run.figures()
    whole = {
        **figures,
        "histograms": run.histograms(),
        "samples": [sample._asdict() for sample in run.samples],
    }
    embedded = json.dumps(whole).replace("<", "\\u003c")  # nothing in it ends the script
    title = f"Load on {figures['target']}: {figures['users']} users, {figures['seconds']:g} s"
    return "\n".join(
        [
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>',
            f'<meta name="viewport" content="width=device-width"><style>{CSS}{STYLE}</style><h1>{escape(title)}</h1>',
            '<p class="partial">Partial: the run was cut before its end.</p>' if figures["partial"] else "",
            f"<pre>{escape(command)}</pre><p>{escape(machine())}</p>",
            f'<div class="plots">{"".join(plots(run))}</div>',
            table(figures),
            f'<script type="application/json" id="figures">{embedded}</script></html>',
        ]
    )


def machine() -> str:
    """Return when and where it was measured, in one line."""
    when = datetime.fromtimestamp(clock.wall(), UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f"{when}, whisper-fast {version('whisper-fast')}, Python {platform.python_version()}, {sys.platform} "
        f"{platform.machine()}, {os.cpu_count()} processors"
    )


def table(figures: Mapping[str, Any]) -> str:
    rows = (f"<tr><td>{escape(name)}</td><td>{escape(spelled(value))}</td></tr>" for name, value in figures.items())
    return f"<table>{''.join(rows)}</table>"


def spelled(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items()) or "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def plots(run: Run) -> Iterable[str]:
    """Yield the plots: latency over time, percentiles, throughput, what is in flight, processors, memory."""
    samples = run.samples
    latency = ["total_p50", "total_p99", "total_max"] + ["added_p99"] * (run.tally.added.count > 0)
    yield figure("Latency over time", over_time(samples, latency, "ms", log=True))
    yield figure("Percentiles", percentiles({"total": run.tally.total, "added": run.tally.added}))
    yield figure(
        "Throughput",
        over_time(samples, ["answered_per_s", "shed_per_s", "errors_per_s"], "a second"),
    )
    yield figure("In flight", over_time(samples, ["in_flight"], "messages"))
    yield figure("Processors, whoever used them", processors(samples))
    yield figure("Memory", over_time(samples, ["rss_mb"], "MB"))


def figure(title: str, drawing: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{drawing}</section>"


def over_time(samples: Sequence[Sample], names: Sequence[str], unit: str, *, log: bool = False) -> str:
    """Plot some of the samples' values; those of a stretch in which nothing was answered are left out with `log`."""
    lines = [
        Line(
            name.removesuffix("_per_s").replace("_", " "),
            [(s.at, getattr(s, name)) for s in samples],
        )
        for name in names
    ]
    if log:
        lines = [
            Line(
                line.name,
                [(at, max(value, LOWEST)) for at, value in line.points if value],
            )
            for line in lines
        ]
    return across(lines, unit, log=log)


def processors(samples: Sequence[Sample]) -> str:
    count = max((len(sample.cores) for sample in samples), default=0)
    lines = [Line(f"processor {n}", [(s.at, 100 * s.cores[n]) for s in samples]) for n in range(count)]
    return across(lines, "%")


def across(lines: Sequence[Line], unit: str, *, log: bool = False) -> str:
    values = [value for line in lines for _, value in line.points] or [1.0]
    end = max((at for line in lines for at, _ in line.points), default=1.0)
    y = logarithmic(min(values), max(values)) if log else linear(0.0, max(values) or 1.0)
    return plot(lines, linear(0.0, end), y, unit, "seconds since the start")


def percentiles(seen: Mapping[str, Hdr]) -> str:
    """Plot milliseconds over the percentile, each nine as wide as the one before."""
    lines = [Line(name, nines(times)) for name, times in seen.items() if times.count]
    values = [value for line in lines for _, value in line.points] or [1.0]
    last = max((math.ceil(at) for line in lines for at, _ in line.points), default=1)
    ticks = [(float(n), f"{100 - 100 / 10**n:.10g} %") for n in range(last + 1)]
    return plot(
        lines,
        linear(0.0, max(1, last), ticks),
        logarithmic(min(values), max(values)),
        "ms",
        "percentile",
    )


def nines(seen: Hdr) -> list[tuple[float, float]]:
    """Return the curve as (nines, milliseconds); the largest value stands where one message more would."""
    curve = [(share, max(1000 * seconds, LOWEST)) for share, seconds in seen.curve()]
    points = [(-math.log10(max(1 - share, 0.5 / seen.count)), value) for share, value in curve]
    step = max(1, len(points) // POINTS)
    return points[: -1 - step : step] + points[-1 - step :]
