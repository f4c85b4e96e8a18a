"""The command line as a user types it: real processes, their output, their exit codes."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from served import heed_ctrl_c
from typer.testing import CliRunner

from whisper_fast.cli.app import app
from whisper_fast.doctor import limits

COMMANDS = (
    "serve",
    "chat",
    "demo",
    "load",
    "prove",
    "doctor",
    "export",
    "forget",
    "backup",
    "restore",
    "journal",
    "flags",
)
PROGRAM = [sys.executable, "-P", "-m", "whisper_fast"]


class Model(BaseHTTPRequestHandler):
    """A language model that says what it was told: one JSON answer, or the same in two pieces."""

    def do_GET(self):
        self.answer("application/json", json.dumps({"object": "list", "data": [{"id": "parrot"}]}))

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = "I heard: " + asked["messages"][-1]["content"]
        if not asked.get("stream"):
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            return self.answer("application/json", json.dumps({"model": "parrot", "choices": [choice]}))
        pieces = [{"content": text[:5]}, {"content": text[5:]}, {}]
        chunks = [{"choices": [{"index": 0, "delta": piece, "finish_reason": None}]} for piece in pieces]
        chunks[-1]["choices"][0]["finish_reason"] = "stop"
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        return self.answer("text/event-stream", "".join([*lines, "data: [DONE]\n\n"]))

    def answer(self, kind, text):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def environment(tmp_path):
    """An environment with a folder of its own and a model that answers; nothing of the machine's own settings."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Model) as server:
        server.daemon_threads = False
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        ours = ("WHISPER_FAST_", "LLM_")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        yield clean | {
            "WHISPER_FAST_DATA_DIR": str(tmp_path / "data"),
            "LLM_CHAT_API_URL": f"http://127.0.0.1:{server.server_port}/v1",
            "LLM_CHAT_MODEL": "parrot",
        }
        server.shutdown()
        thread.join()


@pytest.fixture
def cli(environment):
    def call(*arguments, said=None, **variables):
        return subprocess.run(
            [*PROGRAM, *map(str, arguments)],
            env=environment | variables,
            input=said,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return call


@pytest.fixture
def server(environment):
    """A running `serve --json` on a free port, and what it printed."""
    process = subprocess.Popen(
        [*PROGRAM, "serve", "--json", "--port", "0"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        line = process.stdout.readline()
        assert line, "serve ended before it was ready"
        yield process, json.loads(line)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def one_object(done):
    """The one JSON object on stdout."""
    assert done.stdout.count("\n") == 1, done
    return json.loads(done.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_speaks_json(command):
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert f"Example: whisper-fast {command}" in shown.output
    assert "--json" in shown.output


def test_doctor_says_what_this_machine_gives(cli):
    done = cli("doctor", "--json")
    found = one_object(done)
    assert done.returncode == 0, found
    assert found["ok"] is True
    assert found["problems"] == []
    assert found["simd"] in {"avx512vnni", "avx2", "neon", "scalar"}
    assert re.fullmatch(r"3\.\d+\.\d+", found["sqlite"])
    assert found["fsync_ms"] > 0
    assert "parrot" in found["llm"]
    assert "no API keys" in found["auth"]


def test_doctor_names_each_problem_and_what_to_do(cli, tmp_path):
    (tmp_path / "file").write_text("in the way")
    nowhere = {"WHISPER_FAST_HOST": "0.0.0.0", "LLM_CHAT_API_URL": "http://127.0.0.1:9/v1"}  # nobody listens on 9
    done = cli("doctor", "--json", "--data-dir", tmp_path / "file", **nowhere)
    found = one_object(done)
    assert done.returncode == 1
    assert found["ok"] is False
    for word in ("WHISPER_FAST_DATA_DIR", "WHISPER_FAST_API_KEYS", "LLM_CHAT_API_URL"):
        assert any(word in problem for problem in found["problems"]), found["problems"]


def test_doctor_shows_a_table_to_people(cli):
    done = cli("doctor")
    assert done.returncode == 0
    assert "fsync_ms" in done.stdout


def test_limits_are_those_of_the_container(tmp_path):
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text("256000000\n")
    assert limits(tmp_path) == {"cpus": 0.5, "memory_mb": 256}


def test_limits_are_those_of_the_machine_where_there_is_no_container(tmp_path):
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    found = limits(tmp_path)
    assert found["cpus"] >= 1
    assert found["memory_mb"] > 256


@pytest.mark.parametrize("command", ["doctor", "chat", "serve"])
def test_a_wrong_variable_is_named_in_one_sentence(cli, command):
    done = cli(command, THREAD_POOL_SIZE="many", said="")
    assert done.returncode == 2
    assert "THREAD_POOL_SIZE is 'many'" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_error_is_also_the_json_object(cli, tmp_path):
    done = cli("backup", tmp_path / "copy.db", "--json")
    assert done.returncode == 1
    assert one_object(done)["type"] == "StoreError"
    assert "Traceback" not in done.stderr


def test_wrong_usage_ends_with_2(cli):
    assert cli("chat", "--colour", "blue").returncode == 2
    assert cli("paint").returncode == 2
    assert cli("load", "--users", "0").returncode == 2


@pytest.mark.parametrize("user", ["", "a\nb", "x" * 10_000])
def test_a_user_that_nobody_can_be_is_refused(cli, user):
    done = cli("forget", user, "--yes", "--json")
    assert done.returncode == 2
    assert one_object(done)["type"] == "InvalidMessage"


def test_chat_answers_one_message_and_remembers_it(cli):
    told = one_object(cli("chat", "My cat Miso hates the rain.", "--user", "u1", "--json"))
    assert told["text"] == "I heard: My cat Miso hates the rain."
    asked = one_object(cli("chat", "--user", "u1", "--json", said="What does my cat Miso hate?"))
    assert any("Miso hates the rain" in memory["text"] for memory in asked["memories"])


def test_chat_streams_to_a_terminal_until_an_empty_line(environment):
    ours, theirs = pty.openpty()
    with subprocess.Popen([*PROGRAM, "chat"], env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        os.write(ours, b"hello there\n\n")
        shown = read_all(ours)
        assert process.wait(30) == 0
    os.close(ours)
    assert "I heard: hello there" in shown
    assert "memories" in shown


def test_ctrl_c_ends_a_chat_without_a_traceback(environment):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([*PROGRAM, "chat"], env=environment, preexec_fn=heed_ctrl_c, **pipes) as process:
        assert process.stdout.read(1)  # the greeting: the engine is open
        process.send_signal(signal.SIGINT)
        process.stdin.close()
        error = process.stderr.read().decode()
        assert process.wait(30) == 130
    assert "Traceback" not in error


def read_all(terminal):
    """What a terminal shows until the program on it ends."""
    shown = b""
    try:
        while piece := os.read(terminal, 65536):
            shown += piece
    except OSError:  # Linux says EIO when the other side has closed
        pass
    return shown.decode()


README = (Path(__file__).parents[1] / "README.md").read_text()
LIBRARY, CLIENT = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
(CURL,) = re.findall(r"^curl .*?(?=^```)", README, re.MULTILINE | re.DOTALL)


def test_the_readmes_library_example_remembers(environment, tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-c", LIBRARY],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "I heard: What does my cat hate?" in done.stdout
    assert "Recalled(id=1, text='My cat Miso hates the rain.'" in done.stdout


def test_the_readmes_clients_talk_to_the_server(server, environment):
    _, printed = server
    told = CURL.replace("http://127.0.0.1:8765", printed["url"])
    done = subprocess.run(["sh", "-c", told], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == "I heard: My cat Miso hates the rain."
    asked = CLIENT.replace("http://127.0.0.1:8765", printed["url"])
    done = subprocess.run(
        [sys.executable, "-P", "-c", asked], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "I heard: What does my cat hate?", done.stderr


def test_serve_tells_a_person_where_it_is_and_which_model_answers(environment):
    with subprocess.Popen(
        [*PROGRAM, "serve", "--port", "0"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        line = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
        assert process.wait(30) == 0
    assert re.match(r"Chat page: http://127\.0\.0\.1:\d+/ ", line)
    assert "The language model is model parrot" in said


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_serve_says_where_it_is_and_stops_cleanly(server, end):
    process, printed = server
    assert printed["url"].startswith("http://127.0.0.1:")
    assert printed["pid"] == process.pid
    process.send_signal(end)
    assert process.wait(30) == 0
    assert process.stdout.read() == ""


def test_data_commands_work_beside_a_running_server(cli, server, tmp_path):
    assert one_object(cli("chat", "This is refused.", "--json"))["type"] == "StoreLocked"
    assert one_object(cli("export", "u1", "--json")) == {"user": "u1", "records": [], "path": None}
    assert one_object(cli("backup", tmp_path / "copy.db", "--json"))["rows"]["memory"] == 0
    assert one_object(cli("forget", "u1", "--yes", "--json")) == {"user": "u1", "deleted": 0}


def test_what_is_exported_can_be_forgotten_and_restored(cli, tmp_path):
    cli("chat", "My sister lives in Oslo.", "--user", "u1", "--json")
    cli("chat", "I live in Rome.", "--user", "u2", "--json")
    exported = cli("export", "u1")
    records = [json.loads(line) for line in exported.stdout.splitlines()]
    assert {record["kind"] for record in records} == {"memory", "conversation", "journal"}
    assert all("Rome" not in line for line in exported.stdout.splitlines())
    assert one_object(cli("backup", tmp_path / "copy.db", "--json"))["rows"]["memory"] == 2
    assert one_object(cli("forget", "u1", "--yes", "--json"))["deleted"] > 0
    assert one_object(cli("export", "u1", "--json"))["records"] == []
    assert len(one_object(cli("export", "u2", "--json"))["records"]) > 0
    assert cli("restore", tmp_path / "copy.db", "--json").returncode == 0
    assert cli("export", "u1").stdout == exported.stdout


def test_an_export_to_a_file_is_its_owners_alone(cli, tmp_path):
    cli("chat", "My sister lives in Oslo.", "--user", "u1", "--json")
    done = one_object(cli("export", "u1", "--output", tmp_path / "u1.jsonl", "--json"))
    lines = Path(done["path"]).read_text().splitlines()
    assert done["records"] == len(lines) > 0
    assert Path(done["path"]).stat().st_mode & 0o777 == 0o600


def test_forget_asks_first(cli):
    cli("chat", "My sister lives in Oslo.", "--user", "u1", "--json")
    assert cli("forget", "u1", said="n\n").returncode == 1
    assert one_object(cli("export", "u1", "--json"))["records"]
    assert cli("forget", "u1", said="y\n").returncode == 0
    assert one_object(cli("export", "u1", "--json"))["records"] == []


def test_a_broken_backup_is_refused_and_nothing_changes(cli, tmp_path):
    cli("chat", "My sister lives in Oslo.", "--user", "u1", "--json")
    (tmp_path / "broken.db").write_bytes(b"this is no database" * 1000)
    before = cli("export", "u1").stdout
    done = cli("restore", tmp_path / "broken.db", "--json")
    assert done.returncode == 1
    assert one_object(done)["type"] == "StoreCorrupt"
    assert cli("export", "u1").stdout == before


def test_journal_lists_what_waits_for_a_decision(cli, environment):
    code = """
import asyncio, sys
from whisper_fast import Engine, Message, Settings
async def main():
    async with Engine.open(Settings()) as engine:
        await engine.submit(Message(user="ann", text="hello", id="m1"))
asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
    listed = one_object(cli("journal", "--json"))
    assert [(entry["state"], entry["message_id"]) for entry in listed["entries"]] == [("held", "m1")]
    number = listed["entries"][0]["id"]
    assert "m1" in cli("journal").stdout
    wrong = cli("journal", "--drop", number, "--release", 999, "--json")
    assert (wrong.returncode, "999" in one_object(wrong)["error"]) == (2, True)
    assert one_object(cli("journal", "--drop", number, "--json")) == {"entries": [], "released": 0, "dropped": 1}
