"""Which language model a start finds: the one that is set, one on this machine, or a simulated one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from whisper_fast.errors import LLMError, SettingsError

from .endpoint import Endpoint
from .provider import OpenAIProvider
from .simulated import SimulatedLLM

if TYPE_CHECKING:
    from collections.abc import Mapping

    from whisper_fast.settings import Settings

__all__ = ["LOCAL_SERVERS", "discover", "fallbacks"]

LOCAL_SERVERS = {"LM Studio": 1234, "Ollama": 11434, "llama.cpp": 8080, "vLLM": 8000}
"""Servers that people run on their own machine, and the ports that they use unless told otherwise."""

VARIABLES = {
    "base_url": "LLM_CHAT_API_URL",
    "api_key": "LLM_CHAT_API_KEY",
    "ca_file": "WHISPER_FAST_LLM_CA_FILE",
    "proxy": "WHISPER_FAST_LLM_PROXY",
}
WAIT = 0.3  # seconds for all of them together


async def discover(
    settings: Settings, *, servers: Mapping[str, int] = LOCAL_SERVERS, wait: float = WAIT
) -> tuple[Endpoint | SimulatedLLM, str]:
    """Return where to ask, and a sentence that says which model that is, where, why, and how to change it.

    LLM_CHAT_API_URL wins. Else each of `servers` (name -> port) is asked on 127.0.0.1 for its models, all at
    once for at most `wait` seconds, and the first of them that has one is taken. Else the simulated model.
    The API key goes to the address that was set and to no other. Raises SettingsError for an address or a key
    that cannot be used.
    """
    if settings.llm_chat_api_url:
        return configured(settings)
    import aiohttp  # noqa: F401 - loaded here, so that loading it takes none of the time for asking

    probes = [asyncio.create_task(first_model(port, wait), name=f"llm-probe-{port}") for port in servers.values()]
    try:
        found = await asyncio.gather(*probes)
    finally:
        for probe in probes:
            probe.cancel()
    for (name, port), model in zip(servers.items(), found, strict=True):
        if model is not None:
            return local(settings, name, port, model)
    places = ", ".join(f"{name} :{port}" for name, port in servers.items())
    return SimulatedLLM(), (
        f"The language model is simulated: LLM_CHAT_API_URL is not set and nothing answered on 127.0.0.1 "
        f"({places}). Set LLM_CHAT_API_URL to use a real one."
    )


def configured(settings: Settings) -> tuple[Endpoint, str]:
    """Return the endpoint that the settings name; raises SettingsError that names the variable."""
    key = settings.llm_chat_api_key.get_secret_value() if settings.llm_chat_api_key else None
    try:
        endpoint = Endpoint(
            settings.llm_chat_api_url or "",
            settings.llm_chat_model or None,
            key or None,
            ca_file=settings.llm_ca_file,
            proxy=settings.llm_proxy.get_secret_value() if settings.llm_proxy else None,
            allow_link_local=settings.llm_allow_link_local,
            max_concurrent=settings.llm_concurrency,
        )
    except SettingsError as error:
        raise SettingsError(in_variables(str(error))) from None
    model = f"model {endpoint.model}" if endpoint.model else "the first model that it serves"
    return endpoint, (
        f"The language model is {model} at {endpoint.base_url}, as LLM_CHAT_API_URL and LLM_CHAT_MODEL say."
    )


def fallbacks(settings: Settings) -> list[Endpoint]:
    """Return the further endpoints that the settings name; raises SettingsError that names the variable."""
    key = settings.llm_fallback_api_key.get_secret_value() if settings.llm_fallback_api_key else None
    try:
        return [
            Endpoint(
                url, settings.llm_chat_model or None, key or None, allow_link_local=settings.llm_allow_link_local
            )
            for url in settings.llm_fallback_urls
        ]
    except SettingsError as error:
        text = str(error).replace("base_url", "WHISPER_FAST_LLM_FALLBACK_URLS")
        raise SettingsError(text.replace("api_key", "WHISPER_FAST_LLM_FALLBACK_API_KEY")) from None


def in_variables(text: str) -> str:
    """Return an endpoint's complaint with the names of the variables in place of its fields'."""
    first, _, rest = text.partition(" ")
    return f"{VARIABLES.get(first, first)} {rest}"


def local(settings: Settings, name: str, port: int, model: str) -> tuple[Endpoint, str]:
    """Return the endpoint of a server that answered on this machine."""
    endpoint = Endpoint(
        f"http://127.0.0.1:{port}", settings.llm_chat_model or model, max_concurrent=settings.llm_concurrency
    )
    return endpoint, (
        f"The language model is {endpoint.model} at {endpoint.base_url}, where a server answered "
        f"({name}'s usual port). Set LLM_CHAT_API_URL and LLM_CHAT_MODEL to use another."
    )


async def first_model(port: int, wait: float) -> str | None:
    """Return the first chat model that a server on this machine has, None where there is none in time."""
    provider = OpenAIProvider(Endpoint(f"http://127.0.0.1:{port}"), timeout=wait)
    try:
        return await provider.ask_model()
    except LLMError:
        return None
    finally:
        await provider.close()
