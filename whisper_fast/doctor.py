"""What this machine and these settings give, and what to do about what is wrong."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import NamedTemporaryFile
from time import perf_counter
from typing import TYPE_CHECKING, Any

import psutil

from .errors import LLMError, LLMTimeout, LLMUnavailable, StoreError, StoreReadOnly

if TYPE_CHECKING:
    from .settings import Settings

__all__ = ["examine", "fsync_ms", "limits"]

FSYNCS = 15
SLOW_FSYNC_MS = 50.0
FREE_MB = 512
CHECKED_BYTES = 256 << 20
ANSWER_SECONDS = 3.0
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


async def examine(settings: Settings) -> dict[str, Any]:
    """Return the findings; `ok` is false when `problems` holds sentences that say what to do."""
    problems: list[str] = []
    findings = {
        "simd": simd(),
        "sqlite": sqlite_version(),
        "fsync_ms": disk(settings.data_dir, problems),
        "llm": await model(settings, problems),
        "auth": access(settings, problems),
        "data_dir": str(settings.data_dir),
        "store": store(settings.data_dir, problems),
        "free_mb": space(settings.data_dir, problems),
        "loop": event_loop(),
        "compiler": compiler(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        **limits(),
    }
    return {**findings, "ok": not problems, "problems": problems}


def simd() -> str:
    """Return the path that the vector kernels take here."""
    from . import _vector

    return _vector.simd()


def sqlite_version() -> str:
    """Return the version of the SQLite that apsw brings."""
    import apsw

    return str(apsw.sqlite_lib_version())


def disk(data_dir: Path, problems: list[str]) -> float | None:
    from .store.files import private_folder

    try:
        private_folder(data_dir)
        took = fsync_ms(data_dir)
    except (OSError, StoreError) as error:
        problems.append(f"{error}; set WHISPER_FAST_DATA_DIR to a folder that you can write")
        return None
    if took > SLOW_FSYNC_MS:
        problems.append(f"an fsync takes {took:.0f} ms, and every reply waits for three; use a faster disk")
    return took


def store(data_dir: Path, problems: list[str]) -> str:
    """Return what the database says of itself: `ok`, that there is none yet, or what is wrong with it.

    One of up to 256 MB is read through.
    """
    from .store.files import DATABASE, connect
    from .store.schema import version_of

    path = data_dir / DATABASE
    if not path.is_file():
        return "none yet; the first start makes it"
    try:
        with closing(connect(path, readonly=True)) as connection:
            version_of(connection)
            check_pages(connection, path)
        if not os.access(path, os.W_OK):
            raise StoreReadOnly(f"{path}: it cannot be written; check the owner and the mount")
    except StoreError as error:
        problems.append(str(error))
        return type(error).__name__
    return "ok"


def check_pages(connection: Any, path: Path) -> None:
    """Read a database through. Raises StoreCorrupt for a damaged page, StoreError of the fitting kind else."""
    import apsw

    from .store.files import translate

    if path.stat().st_size > CHECKED_BYTES:
        return
    try:
        found = connection.execute("PRAGMA quick_check(1)").get
    except apsw.Error as error:
        raise translate(error, str(path)) from error
    if found != "ok":
        raise translate(apsw.CorruptError(f"{found:.200}"), str(path))


def fsync_ms(folder: Path) -> float:
    """Return the median of real fsyncs of 4 KiB in `folder`, in milliseconds. Raises OSError."""
    times = []
    with NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        for _ in range(FSYNCS):
            file.write(bytes(4096))
            file.flush()
            began = perf_counter()
            os.fsync(file.fileno())
            times.append(perf_counter() - began)
    return round(statistics.median(times) * 1000, 3)


def space(data_dir: Path, problems: list[str]) -> int:
    """Return the free megabytes on the disk of the data folder."""
    there = next(folder for folder in (data_dir, *data_dir.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free // 1_000_000
    if free < FREE_MB:
        problems.append(f"only {free} MB are free for {data_dir}; free some, or messages will be refused")
    return free


async def model(settings: Settings, problems: list[str]) -> str:
    """Return the sentence that says which model a start would use; one that was set is asked whether it is there."""
    from .llm import Endpoint, SimulatedLLM
    from .llm.discovery import discover
    from .llm.provider import OpenAIProvider

    found, sentence = await discover(settings)
    if isinstance(found, SimulatedLLM):
        return sentence
    provider = OpenAIProvider(Endpoint(found.base_url, api_key=found.api_key), timeout=ANSWER_SECONDS)
    try:
        await provider.ask_model()
    except (LLMTimeout, LLMUnavailable) as error:
        problems.append(f"{error}; start it, or set LLM_CHAT_API_URL to one that runs")
    except LLMError:
        pass  # it is there; not every server lists its models
    finally:
        await provider.close()
    return sentence


def access(settings: Settings, problems: list[str]) -> str:
    """Say who may call the server."""
    keys, trusted = len(settings.api_keys), len(settings.trusted_api_keys)
    if keys or trusted:
        return f"{keys + trusted} API keys, {trusted} of them may name users"
    if settings.host in LOOPBACK:
        return "no API keys: open to this machine only"
    problems.append(f"WHISPER_FAST_HOST is {settings.host} and there are no keys; set WHISPER_FAST_API_KEYS")
    return "no API keys: serve refuses this address"


def event_loop() -> str:
    try:
        return f"uvloop {version('uvloop')}"
    except PackageNotFoundError:
        return "asyncio"


def compiler() -> str:
    """Return the C compiler's own first line; it is only needed to build from source."""
    found = shutil.which("cc")
    if found is None:
        return "none"
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False, timeout=10)  # noqa: S603
    return said.stdout.partition("\n")[0] or found


def limits(cgroup: Path = Path("/sys/fs/cgroup")) -> dict[str, Any]:
    """Return the CPUs and megabytes of memory that this process may use: the container's where it is in one.

    cgroup v2: `cpu.max` is "quota period" in microseconds or "max", `memory.max` bytes or "max".
    """
    cpus = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    memory = psutil.virtual_memory().total
    quota, _, period = read(cgroup / "cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        cpus = min(cpus, int(quota) / int(period))
    limit = read(cgroup / "memory.max")
    if limit.isdigit():
        memory = min(memory, int(limit))
    return {"cpus": round(cpus, 2), "memory_mb": memory // 1_000_000}


def read(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""
