"""Where a model may be: refused addresses, own certificates, proxies; and requests of no shape."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisper_fast.errors import InvalidMessage, LLMRejected, LLMUnavailable, SettingsError
from whisper_fast.lab.certificates import Certificates
from whisper_fast.lab.faulty import FaultyLLM
from whisper_fast.llm import Endpoint, LLMPool, OpenAIProvider, SimulatedLLM, Timeouts, discover
from whisper_fast.llm.address import forbidden, literal
from whisper_fast.settings import Settings

KEY = "sk-canary-of-a-key"
HELLO = [{"role": "user", "content": "hello"}]

REFUSED = [
    "169.254.169.254", "169.254.1.1", "169.254.169.254.", "2852039166", "0xa9fea9fe", "0xA9.0xFE.0xA9.0xFE",
    "0251.0376.0251.0376", "169.16689662", "169.254.43518", "[fe80::1]", "[fe80::1%25eth0]", "[FEBF::2]",
    "[::ffff:169.254.169.254]", "[::ffff:a9fe:a9fe]", "[::169.254.169.254]", "[64:ff9b::a9fe:a9fe]",
    "[2002:a9fe:a9fe::1]", "[fd00:ec2::254]", "[fd20:ce::254]", "100.100.100.200", "168.63.129.16", "192.0.0.192",
    "metadata.google.internal", "METADATA.google.internal.", "metadata", "metadata.goog", "instance-data",
]  # fmt: skip
ALLOWED = [
    "127.0.0.1", "localhost", "10.0.0.7", "192.168.1.20", "172.17.0.1", "100.64.0.1", "[::1]", "[fd12:3456::1]",
    "[2001:db8::1]", "models.lan", "api.openai.com", "my-metadata.example", "0xbeef.example", "169.255.0.1",
]  # fmt: skip


@pytest.mark.parametrize("host", REFUSED)
def test_link_local_and_metadata_addresses_are_refused_unless_allowed(host):
    with pytest.raises(SettingsError, match="WHISPER_FAST_LLM_ALLOW_LINK_LOCAL"):
        Endpoint(f"http://{host}:8000/v1")
    assert Endpoint(f"http://{host}:8000/v1", allow_link_local=True).base_url


@pytest.mark.parametrize("host", ALLOWED)
def test_other_addresses_are_taken(host):
    assert Endpoint(f"http://{host}:8000").base_url == f"http://{host}:8000/v1"


@given(st.integers(0, 2**32 - 1), st.sampled_from(["{}", "{:#x}", "{:#X}"]))
def test_an_address_written_as_one_number_is_that_address(number, form):
    assert literal(form.format(number)) == ip_address(number)
    mapped = ip_address((0xFFFF << 32) | number)
    assert forbidden(mapped) == forbidden(ip_address(number))
    if ip_address(number) in ip_network("169.254.0.0/16"):
        assert forbidden(mapped)


class Resolver:
    """Stands for the system's resolver: every name has these addresses."""

    found: tuple[str, ...] = ()

    def __init__(self, *args, **options):
        pass

    async def resolve(self, host, port=0, family=socket.AF_INET):
        return [
            {"hostname": host, "host": one, "port": port, "family": family, "proto": 0, "flags": 0}
            for one in self.found
        ]

    async def close(self):
        pass


@pytest.mark.parametrize("address", ["169.254.169.254", "fe80::1%2", "::ffff:169.254.169.254", "fd00:ec2::254"])
async def test_a_name_that_leads_to_such_an_address_is_not_dialled(address, monkeypatch):
    monkeypatch.setattr("aiohttp.resolver.DefaultResolver", Resolver)
    monkeypatch.setattr(Resolver, "found", (address,))
    provider = OpenAIProvider(Endpoint("http://models.example", "m", KEY), timeout=5)
    with pytest.raises(LLMUnavailable, match="link-local or metadata") as caught:
        await provider.chat(HELLO)
    assert KEY not in repr(caught.value.__dict__) + str(caught.value)
    await provider.close()


async def test_of_several_addresses_only_the_allowed_are_dialled(monkeypatch):
    monkeypatch.setattr("aiohttp.resolver.DefaultResolver", Resolver)
    monkeypatch.setattr(Resolver, "found", ("169.254.169.254", "127.0.0.1"))
    async with FaultyLLM(SimulatedLLM(0)) as server:
        provider = OpenAIProvider(Endpoint(f"http://models.example:{server.port}", "m"), timeout=5)
        assert (await provider.chat(HELLO)).text
        await provider.close()


async def test_the_settings_allow_it_and_errors_name_the_variables(tmp_path):
    url = "http://169.254.169.254:8000"
    with pytest.raises(SettingsError, match="LLM_CHAT_API_URL"):
        await discover(Settings(llm_chat_api_url=url))
    found, _ = await discover(Settings(llm_chat_api_url=url, llm_allow_link_local=True))
    assert found.allow_link_local
    with pytest.raises(SettingsError, match="WHISPER_FAST_LLM_CA_FILE"):
        await discover(Settings(llm_chat_api_url="https://models.lan", llm_ca_file=tmp_path / "none.pem"))
    with pytest.raises(SettingsError, match="WHISPER_FAST_LLM_PROXY") as caught:
        await discover(Settings(llm_chat_api_url="http://models.lan", llm_proxy=f"socks://me:{KEY}@proxy"))
    assert KEY not in str(caught.value)


# -- certificates


async def test_a_server_with_its_own_certificate_needs_its_authority(tmp_path):
    certificates = Certificates(tmp_path)
    async with FaultyLLM(SimulatedLLM(0), secure=certificates) as server:
        stranger = OpenAIProvider(Endpoint(server.url, "m"), timeout=5)
        with pytest.raises(LLMUnavailable, match="certificate"):
            await stranger.chat(HELLO)
        trusting = OpenAIProvider(Endpoint(server.url, "m", ca_file=certificates.ca_file), timeout=5)
        assert (await trusting.chat(HELLO)).text
        assert server.requests["/v1/chat/completions"] == 1
        await stranger.close()
        await trusting.close()


def test_a_file_that_is_no_certificate_is_refused(tmp_path):
    file = tmp_path / "ca.pem"
    with pytest.raises(SettingsError, match="No such file"):
        Endpoint("https://h", ca_file=file)
    file.write_text("not a certificate")
    with pytest.raises(SettingsError, match="holds no certificate"):
        Endpoint("https://h", ca_file=file)


# -- proxies


@contextlib.asynccontextmanager
async def proxying():
    """Serve as an HTTP proxy that answers everything itself; yields its address and the request lines it saw."""
    seen = []

    async def handle(reader, writer):
        seen.append((await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[0].decode())
        body = b'{"choices":[{"message":{"content":"by proxy"}}]}'
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", seen
    finally:
        server.close()


async def test_a_proxy_is_used_where_it_is_asked_for_and_nowhere_else(monkeypatch):
    async with proxying() as (proxy, seen), FaultyLLM(SimulatedLLM(0)) as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy)
        direct = OpenAIProvider(Endpoint(server.url, "m"), timeout=5)
        assert "hello" in (await direct.chat(HELLO)).text
        assert not seen
        through = OpenAIProvider(Endpoint("http://models.example/v1", "m", proxy=proxy), timeout=5)
        assert (await through.chat(HELLO)).text == "by proxy"
        assert seen == ["POST http://models.example/v1/chat/completions HTTP/1.1"]
        await direct.close()
        await through.close()


@pytest.mark.parametrize("wrong", ["", "proxy:3128", "socks5://proxy", f"http://me:{KEY}@[::1", "https://proxy"])
def test_a_wrong_proxy_is_refused_and_no_proxy_is_shown(wrong):
    with pytest.raises(SettingsError) as caught:
        Endpoint("http://h", proxy=wrong)
    assert KEY not in str(caught.value)
    assert KEY not in repr(Endpoint("http://h", proxy=f"http://me:{KEY}@proxy:3128"))


@pytest.mark.parametrize("field", ["connect", "first_token", "between_tokens"])
@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_time_that_is_none_is_refused(field, seconds):
    with pytest.raises(SettingsError, match=field):
        Timeouts(**{field: seconds})


# -- requests of no shape


@pytest.mark.parametrize("stream", [False, True])
async def test_messages_of_the_wrong_shape_never_leave_this_machine(stream):
    wrong = ["hello", None, {}, HELLO[0], [], ["hello"], [{}], [{"role": 7}], [None], [HELLO], 7, iter(HELLO)]
    async with FaultyLLM() as server, LLMPool([Endpoint(server.url, "m")]) as pool:
        for messages in wrong:
            with pytest.raises(InvalidMessage, match="messages"):
                await (anext(pool.stream(messages)) if stream else pool.chat(messages))
        assert not server.requests
        assert pool.stats()["in_flight"] == 0


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_an_absurd_limit_is_refused_and_says_what_is_allowed(name):
    async with FaultyLLM(SimulatedLLM(0)) as server:
        provider = OpenAIProvider(Endpoint(server.url, "m"))
        for limit in (0, -1, 2**31, 10**30, 1.5, "many", True, float("inf"), []):
            with pytest.raises(InvalidMessage, match="from 1 to 2147483647"):
                await provider.chat(HELLO, **{name: limit})
        assert not server.requests
        assert (await provider.chat(HELLO, **{name: None})).text
        await provider.close()


async def test_a_prompt_over_the_context_window_is_a_clear_error_that_is_not_retried():
    secret = "words-of-the-prompt"
    body = f'{{"error": {{"code": "context_length_exceeded", "message": "too long: {secret}"}}}}'.encode()

    async def handle(reader, writer):
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body))
        writer.write(body)
        await writer.drain()
        writer.close()

    asked = []
    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with LLMPool([Endpoint(url, "m"), SimulatedLLM(0)]) as pool:
            with pytest.raises(LLMRejected, match=r"400 \(context_length_exceeded\)") as caught:
                await pool.chat([{"role": "user", "content": secret}])
    assert secret not in str(caught.value)
    assert len(asked) == 1
