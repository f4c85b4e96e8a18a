"""The faulty language model from the command line: `python -m whisper_fast.lab.serving`."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from whisper_fast.errors import SettingsError
from whisper_fast.llm import SimulatedLLM

from . import trace
from .certificates import Certificates
from .faulty import FAULTS, FaultyLLM, mixture

if TYPE_CHECKING:
    from whisper_fast.llm import ChatProvider

__all__ = ["main"]


def main() -> None:
    """Serve until SIGINT or SIGTERM; the address goes to stderr."""
    options = parser().parse_args()
    try:
        server = FaultyLLM(
            model(options),
            host=options.host,
            port=options.port,
            fault=options.fault,
            secure=Certificates(options.tls) if options.tls else None,
        )
    except SettingsError as error:
        sys.exit(f"error: {error}")
    server.draw = mixture(options.mix, options.seed)
    server.retry_after = options.retry_after
    asyncio.run(serve(server))


def parser() -> argparse.ArgumentParser:
    """Return the options of the command line."""
    names = argparse.ArgumentParser(
        prog="python -m whisper_fast.lab.serving",
        description="An OpenAI-compatible server on loopback whose model is simulated, and whose faults are real.",
        epilog="faults: " + "; ".join(f"{name} {text}" for name, text in FAULTS.items()),
    )
    names.add_argument("--host", default="127.0.0.1")
    names.add_argument("--port", type=int, default=0, help="0 takes a free one (default)")
    names.add_argument("--latency", type=float, default=0.3, help="seconds (default 0.3)")
    names.add_argument("--tokens", type=int, default=None, help="length of an answer (default: what it quotes)")
    names.add_argument("--trace", type=Path, default=None, help="replay the lengths of this trace's requests instead")
    names.add_argument("--prefill", type=float, default=4000.0, help="prompt tokens a second, with --trace")
    names.add_argument("--decode", type=float, default=60.0, help="answer tokens a second, with --trace")
    names.add_argument("--seed", type=int, default=0)
    names.add_argument("--fault", choices=sorted(FAULTS), default=None, help="what every request suffers")
    names.add_argument("--mix", type=float, default=0.0, help="share of the requests that suffer one of the twelve")
    names.add_argument("--retry-after", default=None, help="header of an answer 429")
    names.add_argument("--tls", type=Path, default=None, help="speak TLS; the CA's certificate goes into this folder")
    return names


def model(options: argparse.Namespace) -> ChatProvider:
    """Return the simulated model that was asked for; raises SettingsError for a trace that is none."""
    if options.trace is None:
        return SimulatedLLM(options.latency, options.tokens, options.seed)
    return trace.TraceLLM(trace.rows(options.trace), prefill=options.prefill, decode=options.decode)


async def serve(server: FaultyLLM) -> None:
    """Serve until SIGINT or SIGTERM."""
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with server:
        sys.stderr.write(f"a simulated model ({server.llm!r}) answers at {server.url}\n")
        await stopped.wait()


if __name__ == "__main__":
    main()
