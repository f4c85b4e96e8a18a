"""The page of a load: whole in itself, true to the figures, and safe whatever is in it."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET

import pytest

from whisper_fast.errors import StoreError
from whisper_fast.lab.load.page import page, write
from whisper_fast.lab.load.plot import Line, linear, logarithmic, plot
from whisper_fast.lab.load.run import Run, Sample
from whisper_fast.lab.load.target import Target
from whisper_fast.lab.traffic import Arrival, Sessions, Traffic

TRAFFIC = Traffic(10, 1.0, 30.0)


class Nobody(Target):
    name = "</script><b>"

    def open(self):
        raise NotImplementedError

    async def answer(self, message, accepted):
        raise NotImplementedError


def measured(answers=100):
    """A run of which a hundred answers were taken down."""
    run = Run(TRAFFIC, Sessions(TRAFFIC), Nobody())
    for n in range(answers):
        arrival = Arrival(n / 10, n, 0)
        run.tally.begin()
        promise = run.tally.promise(arrival)
        run.tally.answer(arrival, promise, arrival.at + (n + 1) / 1000, 0.0005)
        run.tally.end(arrival.at)
    run.samples = [Sample(s, 9.0, 0.0, 1.0, 3, 5.0, 9.0, 0.0, 4.0, 50.0 + s, [0.5, 0.25 * s]) for s in (1, 2, 3)]
    return run


def drawings(text):
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def test_the_page_needs_nothing_else_and_holds_every_figure():
    run = measured()
    text = page(run, "whisper-fast load --users 10 <x>")
    assert not re.search(r"(src|href)=|https?:|url\(|@import", text)
    assert "load --users 10 &lt;x&gt;" in text
    assert "<b>" not in text
    assert "Partial" in text
    held = json.loads(re.search(r'<script type="application/json" id="figures">(.*?)</script>', text)[1])
    assert held["turns"] == 100
    assert held.items() >= json.loads(json.dumps(run.figures())).items()
    assert len(held["samples"]) == 3
    for name in run.figures():
        assert f"<td>{name}</td>" in text
    run.partial = False
    assert "Partial" not in page(run, "")


def test_its_plots_show_what_was_measured():
    latency, percentiles, throughput, flying, processors, memory = drawings(page(measured(), ""))
    assert [len(line.get("points").split()) for line in lines(latency)] == [
        3,
        3,
        0,
        3,
    ]  # no logarithm has a 0
    assert len(lines(percentiles)) == 2
    assert len(lines(percentiles)[0].get("points").split()) == 100
    assert len(lines(throughput)) == 3
    assert len(lines(flying)) == len(lines(memory)) == 1
    assert len(lines(processors)) == 2
    heights = [float(point.split(",")[1]) for point in lines(memory)[0].get("points").split()]
    assert heights == sorted(heights, reverse=True)  # more memory stands higher
    assert "total: 100" in "".join(title.text for title in percentiles.iter("title"))


def lines(svg):
    return list(svg.iter("polyline"))


def test_a_run_without_anything_has_a_page_too():
    run = Run(TRAFFIC, Sessions(TRAFFIC), Nobody())
    assert len(drawings(page(run, ""))) == 6


def test_scales_place_values_and_name_round_ones():
    scale = linear(0.0, 47.0)
    assert [text for _, text in scale.ticks] == ["0", "10", "20", "30", "40"]
    assert scale.place(23.5) == 0.5
    assert linear(5.0, 5.0).place(5.0) == 0.0
    scale = logarithmic(0.3, 40.0)
    assert [text for _, text in scale.ticks] == ["0.1", "1", "10", "100"]
    assert scale.place(1.0) == pytest.approx(1 / 3)
    drawn = plot(
        [Line("a", [(0.0, 1.0), (1.0, math.inf), (2.0, 3.0)])],
        linear(0, 2),
        linear(0, 3),
        "ms",
        "x",
    )
    assert len(lines(drawings(drawn)[0])[0].get("points").split()) == 2


def test_a_page_that_cannot_be_written_is_told(tmp_path):
    write(measured(), tmp_path / "page.html", "")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    with pytest.raises(StoreError, match="cannot be written"):
        write(measured(), tmp_path, "")
