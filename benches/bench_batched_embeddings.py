"""Embeddings through the batcher, as a share of the same embedder over all texts sorted by length.

Goal: 98 %. The texts have log-normal lengths and come from fifty users. `as they come` is the batcher that knows no
lengths: what MiniLM loses to texts of many lengths in one batch.
"""

import asyncio
import math
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time

import pytest
import uvloop

from whisper_fast.batcher import MicroBatcher
from whisper_fast.errors import SettingsError
from whisper_fast.models.embedder import StaticEmbedder, bounds
from whisper_fast.models.onnx import MiniLMEmbedder

BATCH = 32
USERS = 50
WORDS = [
    "hello",
    "world",
    "cat",
    "run",
    "tree",
    "music",
    "night",
    "happy",
    "coffee",
    "river",
    "work",
    "friend",
    "dog",
    "morning",
    "sad",
    "rain",
]


def texts(count):
    rng = random.Random(3)
    return [
        " ".join(rng.choices(WORDS, k=max(1, round(rng.lognormvariate(math.log(10), 0.8))))) for _ in range(count)
    ]


def offline(embedder, sentences):
    """Return the CPU seconds for all texts, sorted by length: other load on the machine is no cost of ours."""
    ordered = sorted(sentences, key=len)
    begin = process_time()
    for start in range(0, len(ordered), BATCH):
        embedder.embed(ordered[start : start + BATCH])
    return process_time() - begin


async def through(embedder, sentences, limits):
    """Return the CPU seconds for all texts, and the batcher's counters."""
    async with MicroBatcher(embedder.embed, max_batch=BATCH, max_queue=1 << 20, **limits) as batcher:
        begin = process_time()
        await asyncio.gather(*(batcher.submit_rows(sentences[user::USERS], user=user) for user in range(USERS)))
        return process_time() - begin, batcher.stats()


def shares(embedder, count, runs=3):
    """Yield (how, share of the offline run, counters)."""
    sentences = texts(count)
    embedder.embed(sentences[:BATCH])
    best = min(offline(embedder, sentences) for _ in range(runs))
    for how, limits in {"as they come": {}, "as the engine does": bounds(embedder)}.items():
        spent, stats = min(
            (uvloop.run(through(embedder, sentences, limits)) for _ in range(runs)), key=lambda found: found[0]
        )
        yield how, best / spent, stats


@pytest.mark.parametrize(("kind", "count"), [("static", 8000), ("minilm", 400)])
def test_share_of_an_offline_run(capsys, kind, count):
    with TemporaryDirectory() as folder:
        try:
            embedder = StaticEmbedder() if kind == "static" else MiniLMEmbedder(Path(folder))
        except SettingsError as error:
            pytest.skip(str(error))
        found = list(shares(embedder, count))
    with capsys.disabled():
        for how, share, stats in found:
            mean = stats.items / stats.batches
            print(f"\n{kind}, {how}: {share:.1%} of the offline run, {mean:.1f} texts a batch", end="")
            print(f", {stats.padded:.1%} padding" if stats.padded else "", end="")
