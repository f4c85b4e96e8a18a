"""What a start finds: the address that is set, a server on this machine, or the simulated model."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import AsyncExitStack, closing
from functools import partial
from time import monotonic

import pytest

from whisper_fast.errors import SettingsError
from whisper_fast.lab.faulty import FaultyLLM
from whisper_fast.llm import Endpoint, LLMPool, SimulatedLLM
from whisper_fast.llm import discover as really_discover
from whisper_fast.llm.discovery import LOCAL_SERVERS, WAIT
from whisper_fast.settings import Settings

KEY = "sk-very-secret-key"
discover = partial(really_discover, wait=5)  # a busy machine is not what is tested here


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("LLM_CHAT_API_URL", "LLM_CHAT_MODEL", "LLM_CHAT_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def free_port():
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return server.getsockname()[1]


@pytest.fixture
def silent_port():
    """Return a port where connections are taken and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


async def test_the_address_that_is_set_wins():
    settings = Settings(llm_chat_api_url="http://models.lan:4000/", llm_chat_model="big", llm_chat_api_key=KEY)
    async with FaultyLLM() as server:
        found, sentence = await discover(settings, servers={"Here": server.port})
        assert not server.requests
    assert found == Endpoint("http://models.lan:4000/v1", "big", KEY)
    assert all(
        part in sentence for part in ("big", "http://models.lan:4000/v1", "LLM_CHAT_API_URL", "LLM_CHAT_MODEL")
    )
    assert KEY not in sentence


async def test_without_a_model_the_sentence_says_which_is_taken():
    found, sentence = await discover(Settings(llm_chat_api_url="http://models.lan:4000"))
    assert (found.model, found.api_key) == (None, None)
    assert "first model" in sentence


@pytest.mark.parametrize("url", ["models.lan:4000", f"http://me:{KEY}@models.lan", "ftp://models.lan"])
async def test_a_wrong_address_stops_the_start_and_names_the_variable(url):
    with pytest.raises(SettingsError, match="LLM_CHAT_API_URL") as caught:
        await discover(Settings(llm_chat_api_url=url))
    assert KEY not in str(caught.value)


async def test_a_wrong_key_stops_the_start_and_names_the_variable():
    with pytest.raises(SettingsError, match="LLM_CHAT_API_KEY"):
        await discover(Settings(llm_chat_api_url="http://models.lan", llm_chat_api_key="two words"))


async def test_a_server_on_this_machine_is_found_asked_without_the_key_and_usable(free_port):
    async with FaultyLLM(SimulatedLLM(0), models=("nomic-embed", "tiny")) as server:
        servers = {"Nobody": free_port, "Ours": server.port}
        found, sentence = await discover(Settings(llm_chat_api_key=KEY), servers=servers)
        assert found == Endpoint(server.url, "tiny")
        assert all(part in sentence for part in ("tiny", server.url, "Ours", "LLM_CHAT_API_URL"))
        async with LLMPool([found]) as pool:
            assert (await pool.chat([{"role": "user", "content": "hi"}])).text


async def test_the_first_of_several_wins_and_a_set_model_is_kept():
    async with AsyncExitStack() as stack:
        servers_up = [await stack.enter_async_context(FaultyLLM(models=(name,))) for name in ("one", "two")]
        servers = {"Second": servers_up[1].port, "First": servers_up[0].port}
        found, _ = await discover(Settings(), servers=servers)
        assert found == Endpoint(servers_up[1].url, "two")
        found, _ = await discover(Settings(llm_chat_model="mine"), servers=servers)
        assert found.model == "mine"


async def test_a_server_without_models_and_a_silent_one_are_passed_over_in_time(silent_port):
    async with FaultyLLM(models=()) as empty, FaultyLLM(models=("good",)) as good:
        begin = monotonic()
        servers = {"Silent": silent_port, "E": empty.port, "G": good.port}
        found, _ = await discover(Settings(), servers=servers, wait=0.6)
        assert monotonic() - begin < 0.6 + 0.5
        assert found == Endpoint(good.url, "good")


async def test_nobody_there_means_simulated_and_says_so(free_port):
    found, sentence = await discover(Settings(), servers={"Nobody": free_port})
    assert isinstance(found, SimulatedLLM)
    assert all(part in sentence for part in ("simulated", "LLM_CHAT_API_URL", str(free_port)))


def test_the_usual_ports_are_looked_at():
    assert WAIT == 0.3
    assert LOCAL_SERVERS == {"LM Studio": 1234, "Ollama": 11434, "llama.cpp": 8080, "vLLM": 8000}


def test_the_faulty_server_starts_from_the_command_line_and_ends_with_a_signal():
    command = [sys.executable, "-m", "whisper_fast.lab.serving", "--port", "0", "--latency", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert "http://127.0.0.1:" in server.stderr.readline()
        server.terminate()
        assert server.wait(timeout=10) == 0


def test_importing_the_language_model_does_not_import_aiohttp():
    script = "import sys, whisper_fast.llm; raise SystemExit('aiohttp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
