"""all-MiniLM-L6-v2 in plain numpy: what the token table is distilled from, and what checks it.

A BERT encoder after Devlin et al. 2018 (arXiv:1810.04805): post-norm layers, learnt positions, GELU with erf; a
text's vector is the mean of its last hidden states at unit length (Reimers and Gurevych 2019, arXiv:1908.10084).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.polynomial import Chebyshev
from numpy.typing import NDArray

__all__ = ["MiniLM", "erf", "read_safetensors"]

Floats = NDArray[np.float32]

ERF: Final = Chebyshev.interpolate(np.vectorize(math.erf), 34, domain=[-4, 4]).coef[1::2]


def erf(x: Floats) -> Floats:
    """Return the error function of each element, right to 1e-7.

    erf is odd, and 1 to 1.6e-8 beyond 4: a Chebyshev series of odd terms, T(2k+1), over [-4, 4]. With z = x / 4 and
    w = 2(2z^2 - 1), Clenshaw's recurrence for odd terms is b[k] = c[k] + w b[k+1] - b[k+2], erf = z (b[0] - b[1]).
    """
    z = np.clip(x.astype(np.float64) * 0.25, -1.0, 1.0)
    w = 4.0 * z * z - 2.0
    ahead, now = np.zeros_like(z), np.full_like(z, ERF[-1])
    for coefficient in ERF[-2::-1]:
        ahead, now = now, coefficient + w * now - ahead
    return (z * (now - ahead)).astype(np.float32)


def read_safetensors(raw: bytes) -> dict[str, NDArray[Any]]:
    """Return the named float32 arrays of a safetensors file: u64 length, JSON header, then the data."""
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    arrays = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] != "F32":
            continue
        start, end = entry["data_offsets"]
        flat = np.frombuffer(raw, "<f4", (end - start) // 4, 8 + length + start)
        arrays[name] = flat.reshape(entry["shape"])
    return arrays


class MiniLM:
    """The encoder over named weights (as in model.safetensors); all its sizes but the head's are read from them."""

    def __init__(self, weights: Mapping[str, Floats], heads: int = 12) -> None:
        self._weights = weights
        self._heads = heads
        self._layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))

    def encode(self, ids: NDArray[np.int64]) -> Floats:
        """Return the mean hidden state [n, d] of sequences [n, length] that have one length, and no padding."""
        hidden = self._embed(ids)
        for i in range(self._layers):
            hidden = self._layer(f"encoder.layer.{i}", hidden)
        mean: Floats = hidden.mean(axis=1)
        return mean

    def _embed(self, ids: NDArray[np.int64]) -> Floats:
        table = self._weights
        hidden = table["embeddings.word_embeddings.weight"][ids]
        hidden = hidden + table["embeddings.position_embeddings.weight"][: ids.shape[1]]
        hidden += table["embeddings.token_type_embeddings.weight"][0]
        return self._normalised("embeddings.LayerNorm", hidden)

    def _layer(self, name: str, hidden: Floats) -> Floats:
        attended = self._linear(f"{name}.attention.output.dense", self._attention(f"{name}.attention.self", hidden))
        hidden = self._normalised(f"{name}.attention.output.LayerNorm", hidden + attended)
        inner = self._linear(f"{name}.intermediate.dense", hidden)
        inner *= 0.5 * (1.0 + erf(inner / np.float32(math.sqrt(2.0))))  # GELU
        return self._normalised(f"{name}.output.LayerNorm", hidden + self._linear(f"{name}.output.dense", inner))

    def _attention(self, name: str, hidden: Floats) -> Floats:
        n, length, width = hidden.shape
        size = width // self._heads

        def part(which: str) -> Floats:
            return self._linear(f"{name}.{which}", hidden).reshape(n, length, self._heads, size).swapaxes(1, 2)

        scores = part("query") @ part("key").swapaxes(2, 3) / np.float32(math.sqrt(size))
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        attended: Floats = (scores @ part("value")).swapaxes(1, 2).reshape(n, length, width)
        return attended

    def _linear(self, name: str, hidden: Floats) -> Floats:
        flat = hidden.reshape(-1, hidden.shape[-1]) @ self._weights[f"{name}.weight"].T
        return (flat + self._weights[f"{name}.bias"]).reshape(*hidden.shape[:-1], -1)

    def _normalised(self, name: str, hidden: Floats) -> Floats:
        centred = hidden - hidden.mean(axis=-1, keepdims=True)
        spread = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + np.float32(1e-12))
        unit: Floats = centred / spread
        return unit * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]
