"""Hit ratios on real traces, of our cache beside LRU, ARC, LIRS, S3-FIFO, SIEVE, W-TinyLFU and the optimum (Belady).

    python cache_traces.py [--sizes 0.02 0.1 0.3] [--only sprite] [--data FOLDER]

Run it in `benches/`. A size is a share of a trace's distinct keys. The columns beside ours are libcachesim's
(`pip install libcachesim`, in the extra `bench`); every key weighs 1 and is put when it was missed. `best` is the
best of them but the optimum. The splice is made here: 100,000 accesses to keys that come twice, the second time soon
(as in corda's trace), a loop of 1,011 keys 100 times, and the first once more with other keys.
"""

from __future__ import annotations

import argparse
import gzip
import heapq
import lzma
import os
import tempfile
from pathlib import Path

import numpy as np

from whisper_fast.cache import Cache

PEERS = ("LRU", "ARC", "LIRS", "S3FIFO", "Sieve", "WTinyLFU", "Belady")
DATA = Path(os.environ.get("WHISPER_FAST_DATA", Path(__file__).parents[2] / "shared" / "data"))
SPLICE_SIZES = (256, 512, 1000)
RECORD = np.dtype([("time", "<u4"), ("key", "<u8"), ("size", "<u4"), ("next", "<i8")])  # libcachesim's oracleGeneral


def load(path):
    """Return a trace's keys, numbered from 0 in order of value."""
    packed = path.read_bytes()
    if path.suffix == ".gz":
        keys = np.array(gzip.decompress(packed).split(), dtype=np.int64)
    else:
        keys = np.frombuffer(lzma.decompress(packed), dtype=">u4").astype(np.int64)
    return np.unique(keys, return_inverse=True)[1]


def twice_soon(count, first, random):
    """Return `count` accesses to ever new keys, each asked for a second time about 150 accesses later."""
    due, made, keys = [], first, []
    for at in range(count):
        if due and due[0][0] <= at:
            keys.append(heapq.heappop(due)[1])
        else:
            keys.append(made)
            heapq.heappush(due, (at + 1 + int(random.exponential(150)), made))
            made += 1
    return keys


def splice():
    random = np.random.default_rng(1)
    loop = list(range(1011)) * 100
    keys = twice_soon(100_000, 10**6, random) + loop + twice_soon(100_000, 2 * 10**6, random)
    return np.unique(np.array(keys), return_inverse=True)[1]


def ours(keys, size):
    cache = Cache(size)
    get, put = cache.get, cache.put
    for key in keys.tolist():
        if get(key) is None:
            put(key, True)
    stats = cache.stats()
    return stats.hits / stats.gets


def record(keys, path):
    """Write the trace as libcachesim reads it, each access with the time of the key's next one (-1: none)."""
    order = np.argsort(keys, kind="stable")
    following = np.full(len(keys), -1, np.int64)
    same = keys[order][1:] == keys[order][:-1]
    following[order[:-1][same]] = order[1:][same]
    rows = np.zeros(len(keys), RECORD)
    rows["time"], rows["key"], rows["size"], rows["next"] = np.arange(len(keys)) // 1000, keys + 1, 1, following
    rows.tofile(path)


def theirs(name, path, size):
    import libcachesim

    options = libcachesim.ReaderInitParam(ignore_obj_size=True)
    kind = libcachesim.TraceType.ORACLE_GENERAL_TRACE
    reader = libcachesim.TraceReader(trace=str(path), trace_type=kind, reader_init_params=options)
    return 1 - getattr(libcachesim, name)(cache_size=size).process_trace(reader)[0]


def row(name, keys, size, path):
    """Return one cell's ratios in percent: ours, then the peers' by name."""
    found = {"Cache": 100 * ours(keys, size)}
    if path is not None:
        found |= {peer: 100 * theirs(peer, path, size) for peer in PEERS}
    print(f"{name:10}{size:7}" + "".join(f"{ratio:10.2f}" for ratio in found.values()), end="")
    if path is not None:
        best = max(ratio for peer, ratio in found.items() if peer not in ("Cache", "Belady"))
        print(f"{found['Cache'] - best:10.2f}{found['Cache'] - found['LRU']:10.2f}", end="")
        gain = found["Belady"] - found["LRU"]
        print(f"{(found['Cache'] - found['LRU']) / gain:10.3f}" if gain > 0 else "", end="")
        found["best"] = best
    print(flush=True)
    found["splice"] = name == "splice"
    return found


def splices(rows):
    """Return how many of the splice's rows have at least 96 % of the optimum's advantage over LRU, of how many."""
    shares = [(f["Cache"] - f["LRU"]) / (f["Belady"] - f["LRU"]) for f in rows if f["splice"]]
    return sum(share >= 0.96 for share in shares), len(shares)


def traces(folder, only, shares):
    for path in sorted(folder.glob("*.trace.*")):
        name = path.name.split(".")[0]
        if only in (None, name):
            keys = load(path)
            yield name, keys, [max(4, int(share * (keys.max() + 1))) for share in shares]
    if only in (None, "splice"):
        yield "splice", splice(), SPLICE_SIZES


def compared():
    try:
        import libcachesim  # noqa: F401
    except ImportError:
        print("libcachesim is not installed: only our own column")
        return False
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.02, 0.1, 0.3])
    parser.add_argument("--only")
    parser.add_argument("--data", type=Path, default=DATA / "cache_traces")
    options = parser.parse_args()
    if not options.data.is_dir():
        print(f"there are no traces in {options.data} (WHISPER_FAST_DATA says where): only the splice")
    peers = PEERS if compared() else ()
    columns = ("Cache", *peers, *(("- best", "- LRU", "of optimum") if peers else ()))
    print(f"{'trace':10}{'size':>7}" + "".join(f"{column:>10}" for column in columns))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, keys, sizes in traces(options.data, options.only, options.sizes):
            path = Path(folder) / name if peers else None
            if path is not None:
                record(keys, path)
            rows += [row(name, keys, size, path) for size in sizes]
    if peers:
        good = sum(found["Cache"] >= found["best"] - 0.5 for found in rows)
        no_worse = sum(found["Cache"] >= found["LRU"] - 0.5 for found in rows)
        enough, judged = splices(rows)
        print(
            f"{good} of {len(rows)} within 0.5 of the best column or above, {no_worse} within 0.5 of LRU or above; "
            f"{enough} of {judged} of the splice with at least 96 % of the optimum's advantage over LRU"
        )


if __name__ == "__main__":
    main()
