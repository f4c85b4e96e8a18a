"""What `export` wrote is taken in again: once, under new ids, by the user who had it or another."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hashing import HashEmbedder

from whisper_fast.errors import InvalidMessage, StoreReadOnly
from whisper_fast.memory import MemoryStore
from whisper_fast.memory.intake import from_lines, take_in


def command(*arguments, folder, code=0):
    line = [sys.executable, "-m", "whisper_fast", *arguments, "--data-dir", str(folder), "--json"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)


TOLD = [
    {
        "text": "My cat is called Turing",
        "scope": "global",
        "at": 5.5,
        "speaker": "ada",
        "session": "s",
        "source": "m1",
    },
    *({"text": "ok", "at": float(at)} for at in (1, 1, 1)),
    {"text": "Ünïcödé 🎉", "metadata": {"a": [1, None]}, "at": 9.0, "scope": "server:1/public"},
]


async def told(folder, user):
    async with MemoryStore.open(folder) as memory:
        return [{**item, "source": None} async for item in memory.export(user)]


async def test_export_and_import_through_the_command_line(tmp_path):
    async with MemoryStore.open(tmp_path / "one") as memory:
        await memory.add_many("ada", TOLD)
    file = tmp_path / "ada.jsonl"
    command("export", "ada", "--output", str(file), folder=tmp_path / "one")
    arguments = ("import", str(file))
    dry = command(*arguments, "--dry-run", folder=tmp_path / "two")
    assert (dry["read"], dry["stored"], dry["known"], dry["users"]) == (5, 5, 0, 1)
    assert await told(tmp_path / "two", "ada") == []
    assert command(*arguments, folder=tmp_path / "two")["stored"] == 5
    again = command(*arguments, folder=tmp_path / "two")
    assert (again["stored"], again["known"]) == (0, 5)
    assert await told(tmp_path / "two", "ada") == await told(tmp_path / "one", "ada")
    assert command(*arguments, "--user", "eve", folder=tmp_path / "two")["stored"] == 5
    assert len(await told(tmp_path / "two", "eve")) == 5


def test_the_command_says_what_is_wrong_in_one_sentence(tmp_path):
    assert "cannot be read" in command("import", str(tmp_path / "none"), folder=tmp_path, code=1)["error"]
    (tmp_path / "bad").write_bytes(b'{"text": "x", "user": "u"}\n\xff\xfe\n')
    assert "line 2" in command("import", str(tmp_path / "bad"), folder=tmp_path, code=2)["error"]
    (tmp_path / "ownerless").write_text('{"text": "x"}\n')
    assert "--user" in command("import", str(tmp_path / "ownerless"), folder=tmp_path, code=2)["error"]


async def test_records_that_cannot_be_memories_are_counted_and_the_rest_is_stored(tmp_path):
    file = tmp_path / "lines"
    good, bad = {"user": "ada", "text": "fine"}, [{"text": ""}, {"text": "x", "scope": "mars"}, {"text": 5}, {}]
    rows = [good, *({"user": "ada", **row} for row in bad), {"user": "", "text": "x"}, {"kind": "journal"}]
    file.write_text("\n\n".join(map(json.dumps, rows)))
    steps = []
    async with MemoryStore.open(tmp_path / "store", HashEmbedder()) as memory:
        counts = await take_in(memory, from_lines(file, None), progress=steps.append)
        assert [item["text"] async for item in memory.export("ada")] == ["fine"]
    assert counts == {"read": 6, "stored": 1, "known": 0, "invalid": 5, "users": 2}
    assert steps == [6]


async def test_errors_of_a_file_are_typed(tmp_path):
    with pytest.raises(StoreReadOnly):
        await anext(from_lines(tmp_path, None))
    (tmp_path / "list").write_text("[1]")
    with pytest.raises(InvalidMessage, match="line 1"):
        await anext(from_lines(tmp_path / "list", None))
