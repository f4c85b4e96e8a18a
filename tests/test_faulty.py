"""The faulty language model itself: its counters, its command line, and the trace that it replays."""

from __future__ import annotations

import asyncio
import gzip
import os
import subprocess
import sys
import urllib.request
from collections import Counter
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from whisper_fast.errors import LLMUnavailable, SettingsError
from whisper_fast.lab.faulty import FAULTS, TWELVE, FaultyLLM, mixture
from whisper_fast.lab.trace import Row, TraceLLM, rows
from whisper_fast.llm import Endpoint, OpenAIProvider, SimulatedLLM

HELLO = [{"role": "user", "content": "hello"}]
AZURE = Path(os.environ.get("WHISPER_FAST_DATA", Path(__file__).parents[2] / "shared" / "data")) / "llm_trace"


def test_a_mixture_strikes_its_share_and_is_the_same_for_the_same_seed():
    drawn = [mixture(0.25, seed=3)() for _ in range(3)] + [None]
    assert set(drawn) <= {*TWELVE, None}
    draw, again = mixture(0.25, seed=3), mixture(0.25, seed=3)
    seen = [draw() for _ in range(4000)]
    assert seen == [again() for _ in range(4000)]
    counts = Counter(seen)
    assert 800 < 4000 - counts[None] < 1200
    assert set(counts) == {*TWELVE, None}
    assert not any(mixture(0)() for _ in range(100))


async def test_counters_tell_what_was_open_struck_and_left():
    async with FaultyLLM(SimulatedLLM(60)) as server:
        provider = OpenAIProvider(Endpoint(server.url, "m"))
        call = asyncio.create_task(provider.chat(HELLO))
        async with asyncio.timeout(10):
            while not server.open:
                await asyncio.sleep(0.002)
        assert server.connections == 1
        call.cancel()
        async with asyncio.timeout(10):
            while server.connections:
                await asyncio.sleep(0.002)
        server.faults.append("error")
        with pytest.raises(LLMUnavailable):
            await provider.chat(HELLO)
        stats = server.stats()
        assert stats["struck"] == {"error": 1}
        assert stats["requests"] == {"/v1/chat/completions": 2}
        assert len(stats["aborted_at"]) == 1
        await provider.close()


def asked(url, body=None):
    data = None if body is None else msgspec.json.encode(body)
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return msgspec.json.decode(answer.read())


def test_a_process_of_its_own_is_steered_over_http(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n")
    command = [sys.executable, "-m", "whisper_fast.lab.serving", "--trace", str(trace), "--decode", "1e6"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        try:
            url = child.stderr.readline().split()[-1]
            root = url.removesuffix("/v1")
            answer = asked(f"{url}/chat/completions", {"model": "m", "messages": HELLO})
            assert answer["usage"] == {"prompt_tokens": 374, "completion_tokens": 44, "total_tokens": 418}
            assert asked(f"{root}/faulty", {"fault": "error"}) == {"fault": "error"}
            with pytest.raises(urllib.error.HTTPError, match="500"):
                asked(f"{url}/chat/completions", {"model": "m", "messages": HELLO})
            with pytest.raises(urllib.error.HTTPError, match="400"):
                asked(f"{root}/faulty", {"fault": "unheard of"})
            assert asked(f"{root}/faulty")["struck"] == {"error": 1}
        finally:
            child.terminate()
            assert child.wait(10) == 0


def test_a_wrong_trace_ends_the_command_in_one_sentence(tmp_path):
    command = [sys.executable, "-m", "whisper_fast.lab.serving", "--trace", str(tmp_path / "none.csv")]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 1
    assert "cannot be read" in child.stderr
    assert "Traceback" not in child.stderr


async def test_a_trace_is_replayed_row_by_row_whole_and_streamed():
    model = TraceLLM([Row(0, 10, 3), Row(1, 20, 100)], prefill=1e9, decode=1e4, tick=0.001)
    assert (await model.chat(HELLO)).usage.completion_tokens == 3
    pieces = [piece async for piece in model.stream(HELLO)]
    assert len(pieces) == 11
    assert "".join(pieces).split() == ["word"] * 100
    assert (pieces[-1].usage.prompt_tokens, pieces[-1].usage.completion_tokens) == (20, 100)
    assert (await model.chat(HELLO)).usage.prompt_tokens == 10, "from the start again"


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "\xff\xfe"])
def test_what_is_no_trace_is_refused(text, tmp_path):
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(text.encode("latin-1")))
    with pytest.raises(SettingsError):
        rows(path)


def test_the_real_trace_is_read():
    files = sorted(AZURE.glob("*.csv.gz")) if AZURE.is_dir() else []
    if not files:
        pytest.skip(f"there is no trace in {AZURE} (WHISPER_FAST_DATA says where the data is)")
    trace = rows(files[0])
    assert len(trace) > 1000
    assert trace[0].at == 0
    assert all(row.prompt > 0 and row.answer > 0 for row in trace)
    assert all(a.at <= b.at for a, b in pairwise(trace))


def test_every_fault_says_what_it_does():
    assert all(text and text[0].islower() for text in FAULTS.values())
