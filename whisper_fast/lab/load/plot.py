"""A plot of lines as SVG that needs nothing else: no script, no font, no address."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["STYLE", "Line", "Scale", "linear", "logarithmic", "plot"]

WIDTH, HEIGHT = 680, 250
LEFT, RIGHT, TOP, BOTTOM = 64, 26, 10, 34
COLOURS: Final = (
    "#2563eb",
    "#dc2626",
    "#059669",
    "#d97706",
    "#7c3aed",
    "#0891b2",
    "#be185d",
    "#4d7c0f",
)
STYLE: Final = (
    "svg{width:100%;height:auto;font:11px system-ui,sans-serif}svg text{fill:currentColor}"
    ".grid{stroke:currentColor;opacity:.15}.line{fill:none;stroke-width:1.6}.dot{opacity:0}.dot:hover{opacity:1}"
    ".key{font-size:.85em;margin:0 1em 0 0;white-space:nowrap}"
    ".key i{display:inline-block;width:1.4em;height:3px;margin-right:.4em;vertical-align:middle}"
    + "".join(
        f".c{n}{{stroke:{c};fill:none}}.dot.c{n}{{fill:{c}}}.key .c{n}{{background:{c}}}"
        for n, c in enumerate(COLOURS)
    )
)


class Line(NamedTuple):
    """A line's name and its points (x, y); a value that is not finite is left out."""

    name: str
    points: Sequence[tuple[float, float]]


class Scale(NamedTuple):
    """From values to shares of an axis, 0 to 1; `ticks` are values with what is written there."""

    place: Callable[[float], float]
    ticks: list[tuple[float, str]]


def linear(low: float, high: float, ticks: list[tuple[float, str]] | None = None) -> Scale:
    """Return a scale from `low` to `high`, its ticks 1, 2 or 5 times a power of ten apart unless they are given."""
    span = (high - low) or 1.0
    if ticks is None:
        rough = span / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
        first = math.ceil(low / step - 1e-9)
        ticks = [(n * step, f"{n * step:g}") for n in range(first, first + 12) if n * step <= high + 1e-9 * span]
    return Scale(lambda value: (value - low) / span, ticks)


def logarithmic(low: float, high: float) -> Scale:
    """Return a scale over whole powers of ten that hold `low` and `high`, both above 0."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    ticks = [(10.0**power, f"{10.0**power:g}") for power in range(first, last + 1)]
    return Scale(lambda value: (math.log10(value) - first) / (last - first), ticks)


def plot(lines: Sequence[Line], x: Scale, y: Scale, unit: str, across: str) -> str:
    """Return the SVG and its legend; `unit` is that of y, `across` what runs along x."""
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    parts += [grid(0.0, y.place(value), text, upright=False) for value, text in y.ticks]
    parts += [grid(x.place(value), 0.0, text, upright=True) for value, text in x.ticks]
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(across)}</text>')
    parts.append(f'<text x="4" y="{HEIGHT - 4}">{escape(unit)}</text>')
    for number, line in enumerate(lines):
        parts.append(drawn(line, x, y, unit, f"c{number % len(COLOURS)}"))
    return "".join(parts) + "</svg>" + "".join(map(key, range(len(lines)), (line.name for line in lines)))


def grid(x: float, y: float, text: str, *, upright: bool) -> str:
    across, down = at(x, y)
    if upright:
        line = f'<line class="grid" x1="{across:.1f}" x2="{across:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        return f'{line}<text x="{across:.1f}" y="{HEIGHT - BOTTOM + 13}" text-anchor="middle">{escape(text)}</text>'
    line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>'
    return f'{line}<text x="{LEFT - 5}" y="{down + 4:.1f}" text-anchor="end">{escape(text)}</text>'


def drawn(line: Line, x: Scale, y: Scale, unit: str, colour: str) -> str:
    """Return a line, and over each point a dot that tells its value under the mouse."""
    points = [(at(x.place(a), y.place(b)), b) for a, b in line.points if math.isfinite(a) and math.isfinite(b)]
    path = " ".join(f"{across:.1f},{down:.1f}" for (across, down), _ in points)
    dots = "".join(
        f'<circle class="dot {colour}" cx="{across:.1f}" cy="{down:.1f}" r="4">'
        f"<title>{escape(line.name)}: {value:g} {escape(unit)}</title></circle>"
        for (across, down), value in points
    )
    return f'<polyline class="line {colour}" points="{path}"/>{dots}'


def at(x: float, y: float) -> tuple[float, float]:
    """Return where on the picture two shares of its axes are."""
    return LEFT + x * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM)


def key(number: int, name: str) -> str:
    return f'<span class="key"><i class="c{number % len(COLOURS)}"></i>{escape(name)}</span>'
