"""An embedder for tests: quick, deterministic, without a model."""

from __future__ import annotations

import zlib

import numpy as np

DIMENSION = 32


class HashEmbedder:
    """Each word has a fixed random direction; a text's vector is their sum."""

    dimension = DIMENSION

    def __init__(self, name="hash"):
        self.name = name
        self.texts = []

    def embed(self, texts):
        self.texts += texts
        return np.stack([self.vector(text) for text in texts])

    def vector(self, text):
        seeds = [zlib.crc32(f"{self.name} {word}".encode()) for word in text.lower().split()]
        total = sum((np.random.default_rng(seed).normal(size=DIMENSION) for seed in seeds), np.zeros(DIMENSION))
        return (total / (np.linalg.norm(total) or 1)).astype(np.float32)
