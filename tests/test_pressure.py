"""What memory a process may use: made-up trees of control groups, broken ones among them, and the machine's own."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_fast.monitor.pressure import Gauge, Pressure, number, trim

MIB = 1 << 20
V2 = "30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1 = "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime shared:1 - cgroup cgroup rw,memory\n"
CPU = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
HYBRID = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"


@pytest.fixture
def tree(tmp_path):
    """Write files below a made-up root and return a gauge on it."""

    def make(files):
        for name, content in {"proc/self/statm": "900 100 50 1 0 80 0\n", **files}.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        return Gauge(tmp_path)

    return make


RSS = 100 * os.sysconf("SC_PAGE_SIZE")


def test_v2_takes_the_smallest_limit_on_the_way_up_and_what_counts_there(tree):
    gauge = tree({
        "proc/self/cgroup": "0::/kube/pod/bot\n",
        "proc/self/mountinfo": CPU + V2,
        "sys/fs/cgroup/kube/pod/bot/memory.max": "max\n",
        "sys/fs/cgroup/kube/pod/bot/memory.current": f"{100 * MIB}\n",
        "sys/fs/cgroup/kube/pod/bot/memory.pressure": "some avg10=12.50 avg60=1.00 total=9\nfull avg10=0.00",
        "sys/fs/cgroup/kube/pod/memory.max": f"{512 * MIB}\n",
        "sys/fs/cgroup/kube/pod/memory.current": f"{300 * MIB}\n",
        "sys/fs/cgroup/kube/pod/memory.stat": f"anon 5\ninactive_file {50 * MIB}\nfile 7\n",
        "sys/fs/cgroup/kube/memory.max": f"{4096 * MIB}\n",
    })  # fmt: skip
    assert gauge.kind == "v2"
    assert gauge.read() == Pressure(RSS, 250 * MIB, 512 * MIB, 12.5)
    assert gauge.read().used == 250 * MIB


def test_v2_in_a_namespace_is_at_the_mount_and_high_counts_too(tree):
    gauge = tree({
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": V2,
        "sys/fs/cgroup/memory.max": f"{512 * MIB}\n",
        "sys/fs/cgroup/memory.high": f"{400 * MIB}\n",
        "sys/fs/cgroup/memory.current": "1\n",
    })  # fmt: skip
    assert gauge.read() == Pressure(RSS, 1, 400 * MIB, None)


def test_v1_below_and_beside_what_is_mounted(tree):
    files = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{256 * MIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{200 * MIB}\n",
        "sys/fs/cgroup/memory/memory.stat": f"cache 3\ntotal_inactive_file {20 * MIB}\n",
    }
    seen = Pressure(RSS, 180 * MIB, 256 * MIB, None)
    for group, root in [("/docker/abc", "/docker/abc"), ("/docker/abc", "/"), ("/../other", "/"), ("/a", "/b")]:
        mounts = V1.format(root=root) + HYBRID
        gauge = tree({**files, "proc/self/cgroup": f"4:memory:{group}\n0::/\n", "proc/self/mountinfo": mounts})
        assert gauge.kind == "v1"
        assert gauge.read() == seen


def test_v1_without_a_limit_knows_none_and_not_what_others_use(tree):
    gauge = tree({
        "proc/self/cgroup": "4:memory:/x\n",
        "proc/self/mountinfo": V1.format(root="/"),
        "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{9000 * MIB}\n",
        "proc/pressure/memory": "some avg10=99.00",
    })  # fmt: skip
    assert gauge.read() == Pressure(RSS, None, None, None)


def test_without_groups_there_is_the_process_and_the_machines_pressure(tree):
    gauge = tree({"proc/pressure/memory": "some avg10=3.00 avg60=0.00\n"})
    assert gauge.kind == "none"
    assert gauge.read() == Pressure(RSS, None, None, 3.0)


def test_nothing_readable_is_unknown(tmp_path):
    gauge = Gauge(tmp_path / "nowhere")
    assert gauge.read() == Pressure()
    assert gauge.read().used is None


def test_folders_in_the_place_of_files_are_unknown(tmp_path):
    for name in ("proc/self/statm", "proc/self/cgroup", "proc/self/mountinfo", "proc/pressure/memory"):
        (tmp_path / name).mkdir(parents=True)
    assert Gauge(tmp_path).read() == Pressure()


WORDS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["max", "-1", "1e9", "9" * 400, "٣", "some avg10=nan", "some avg10=", "0::", ":::", "0::/..", " - "]
    ),
    st.integers(-(10**20), 10**20).map(str),
)


@settings(max_examples=30, deadline=None)
@given(words=st.lists(WORDS, min_size=8, max_size=8), group=st.sampled_from(["0::/g", "4:memory:/g"]))
def test_whatever_the_files_hold_nothing_is_raised(tmp_path_factory, words, group):
    root = tmp_path_factory.mktemp("root")
    folders = {"0::/g": "sys/fs/cgroup/g", "4:memory:/g": "sys/fs/cgroup/memory/g"}
    names = ("memory.max", "memory.high", "memory.limit_in_bytes", "memory.current", "memory.stat", "memory.pressure")
    files = {
        "proc/self/statm": words[0],
        "proc/self/cgroup": f"{words[1]}\n{group}\n",
        "proc/self/mountinfo": f"{words[2]}\n{V1.format(root='/')}{V2}",
        "proc/pressure/memory": words[3],
        **{f"{folders[group]}/{name}": word for name, word in zip(names, [*words[3:], words[0]], strict=True)},
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    reading = Gauge(root).read()
    for value in reading[:3]:
        assert value is None or value >= 0
    assert reading.limit is None or reading.limit > 0
    assert reading.stalled is None or 0 <= reading.stalled <= 100


def test_numbers():
    assert [number(word) for word in ("12\n", "max", "", "-1", "1.5", "٣", "9" * 21)] == [12, *[None] * 6]


def test_the_machines_own():
    gauge = Gauge()
    reading = gauge.read()
    assert reading.rss == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    assert reading.limit is None or reading.group is not None
    if gauge.kind == "v1":
        assert Path("/proc/self/cgroup").read_text().count(":memory:") == 1
    assert trim() in (True, False)
