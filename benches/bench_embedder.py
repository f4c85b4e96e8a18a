"""Microseconds a text: the static embedder for one text and in batches, its extremes, and VADER beside it."""

from __future__ import annotations

import pytest

from whisper_fast.models.embedder import StaticEmbedder
from whisper_fast.models.emotion import VaderEmotion

SENTENCE = "Last summer my sister {} taught me to bake sourdough bread, remember?"  # 12 words
TEXTS = [SENTENCE.format(f"Ann{i}") for i in range(256)]
EXTREMES = {
    "64 KiB of one sentence": SENTENCE * 950,
    "64 KiB of words met once": " ".join(f"w{i * 7919:x}q{i:x}" for i in range(7000)),
    "64 KiB without a space": "quizzacious" * 6000,
    "64 KiB of ideographs": "東京首都日本" * 3700,
    "64 KiB of punctuation": "?!" * 32_000,
}


def per_text(benchmark, texts):
    if benchmark.enabled:
        microseconds = benchmark.stats.stats.median / texts * 1e6
        benchmark.extra_info["us_a_text"] = round(microseconds, 2)
        print(f"\n{benchmark.name}: {microseconds:.2f} us a text")


@pytest.fixture(scope="module")
def embedder():
    return StaticEmbedder()


@pytest.mark.parametrize("size", [1, 32, 256])
def test_embed(benchmark, embedder, size):
    rows = benchmark(embedder.embed, TEXTS[:size])
    assert rows.shape == (size, embedder.dimension)
    per_text(benchmark, size)


@pytest.mark.parametrize("kind", EXTREMES)
def test_embed_extreme(benchmark, kind):
    """A fresh embedder each round, which remembers no word."""
    rows = benchmark.pedantic(
        lambda embedder: embedder.embed([EXTREMES[kind]]), setup=lambda: ((StaticEmbedder(),), {}), rounds=7
    )
    assert len(rows) == 1
    per_text(benchmark, 1)


def test_load(benchmark):
    assert benchmark.pedantic(StaticEmbedder, rounds=10).dimension
    per_text(benchmark, 1)


def test_emotion(benchmark):
    emotion = VaderEmotion()
    assert benchmark(emotion.analyse, TEXTS[0])
    per_text(benchmark, 1)


@pytest.mark.parametrize("text", ["but " + "😀" * 2000, "not good!!! " * 200], ids=["emoji", "feelings"])
def test_emotion_extreme(benchmark, text):
    emotion = VaderEmotion()
    assert benchmark(emotion.analyse, text)
    per_text(benchmark, 1)


def test_emotion_load(benchmark):
    assert benchmark.pedantic(VaderEmotion, rounds=10)
    per_text(benchmark, 1)
