"""Every error that whisper-fast raises on purpose.

    WhisperFastError
    ├── SettingsError (ValueError)          an environment variable or a Settings argument is wrong
    ├── InvalidMessage (ValueError)         a message, memory or request cannot be accepted as it is
    │   └── IdReused                        its id was used before, for other words
    ├── Overloaded                          a bounded queue is full: come back in `retry_after` seconds
    │   └── Busy                            the user's earlier message is not answered yet: this one is dropped
    ├── Interrupted                         the user's next message ended this answer; it is answered with that one
    ├── Quarantined                         the process died too often in this message's turn: it is set aside
    ├── DeadlineExceeded (TimeoutError)     the time given for something is used up
    ├── Closed                              the part was asked after it had been closed
    ├── LoadCycle (RuntimeError)            the loaders of a cache wait for each other
    ├── BatchMismatch (ValueError)          a batch function returned something other than one result an item
    ├── WorkerDied                          a worker process ended while it had work
    ├── StoreError                          the truth on disk could not be read or written
    │   ├── StoreFull                       no space left
    │   ├── StoreIOError                    the disk failed to read or write
    │   ├── StoreMissing                    the data folder was removed or replaced while it was in use
    │   ├── StoreNoMemory                   SQLite got no memory
    │   ├── StoreReadOnly                   the data folder or file cannot be written
    │   ├── StoreLocked                     another process holds the data folder
    │   ├── StoreUnavailable                the server that holds the store does not answer
    │   ├── StoreCorrupt                    a page or a file is not what was written
    │   └── SchemaTooNew                    the data folder was written by a newer version
    └── LLMError                            the language model gave no usable answer
        ├── LLMUnavailable                  nobody answers at that address, or it answered 5xx
        ├── LLMRateLimited                  it answered 429
        ├── LLMTimeout (TimeoutError)       it did not answer in time
        ├── LLMRejected                     it refused the request (4xx): asking again will not help
        │   └── LLMMisconfigured            it refused our key, our account or our address: its operator can mend that
        └── LLMProtocolError                what it answered is not the protocol

Whether the same call may be tried again is the attribute `retriable`, never something to be read out of a text.
Whether a message that failed so can never be answered, whoever mends what, is `final`.
"""

from __future__ import annotations

from copy import copy
from pathlib import PurePath
from traceback import extract_tb
from typing import Final

__all__ = [
    "BatchMismatch",
    "Busy",
    "Closed",
    "DeadlineExceeded",
    "IdReused",
    "Interrupted",
    "InvalidMessage",
    "LLMError",
    "LLMMisconfigured",
    "LLMProtocolError",
    "LLMRateLimited",
    "LLMRejected",
    "LLMTimeout",
    "LLMUnavailable",
    "LoadCycle",
    "Overloaded",
    "Quarantined",
    "SchemaTooNew",
    "SettingsError",
    "StoreCorrupt",
    "StoreError",
    "StoreFull",
    "StoreIOError",
    "StoreLocked",
    "StoreMissing",
    "StoreNoMemory",
    "StoreReadOnly",
    "StoreUnavailable",
    "WhisperFastError",
    "WorkerDied",
    "described",
    "own_copy",
]

LINES_TOLD: Final = 3  # of the way to an error


class WhisperFastError(Exception):
    """Base of all errors of this package; `retriable` says whether the same call may succeed later.

    An accepted message whose error is `final` is closed; any other stays open. One whose error is `mendable` is
    tried again later although its call is not.
    """

    retriable = False
    final = False
    mendable = False
    retry_after: float | None = None  # seconds

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        if retry_after is not None:
            self.retry_after = retry_after

    def copy(self) -> WhisperFastError:
        """Return an equal error without a traceback: each waiter of a shared failure raises its own."""
        twin = type(self)(*self.args)
        twin.__dict__.update(self.__dict__)
        return twin


class SettingsError(WhisperFastError, ValueError):
    """A setting is wrong; the text names the variable, the value found and what is allowed."""


class InvalidMessage(WhisperFastError, ValueError):
    """A message, memory or request cannot be accepted as it is; the text says what was found."""

    final = True


class IdReused(InvalidMessage):
    """The message's id was used before in its channel, for other words; a new message needs a new id."""


class Overloaded(WhisperFastError):
    """A bounded queue is full; nothing was stored, come back in `retry_after` seconds."""

    retriable = True
    retry_after = 1.0


class Busy(Overloaded):
    """The user's earlier message in this channel is not answered yet, and the channel drops what comes meanwhile."""


class Interrupted(WhisperFastError):
    """The user's next message ended this answer half-way; both are answered together, under either id."""


class Quarantined(WhisperFastError):
    """The process died too often in this message's turn; it is set aside until somebody releases it."""


class DeadlineExceeded(WhisperFastError, TimeoutError):
    """The time given for something is used up."""

    retriable = True


class Closed(WhisperFastError):
    """The part was asked to work after it had been closed."""


class LoadCycle(WhisperFastError, RuntimeError):
    """A cache's loader asked for a value whose loading waits for that loader: it would wait for ever."""


class BatchMismatch(WhisperFastError, ValueError):
    """A batch function must return a sequence with one result for each item, in their order."""


class WorkerDied(WhisperFastError):
    """A worker process ended while it had work; not retriable, for the work may be what killed it."""


class StoreError(WhisperFastError):
    """The truth on disk could not be read or written."""


class StoreFull(StoreError):
    """No space is left for the data folder; nothing of the failed write was kept."""

    retriable = True
    retry_after = 30.0


class StoreIOError(StoreError):
    """The disk failed to read or write; nothing of the failed write counts, the engine tries again by itself."""

    retriable = True
    retry_after = 5.0


class StoreMissing(StoreError):
    """The data folder or its database was removed or replaced while it was in use."""

    retriable = True
    retry_after = 30.0


class StoreNoMemory(StoreError):
    """SQLite got no memory for a read or write."""

    retriable = True
    retry_after = 5.0


class StoreReadOnly(StoreError):
    """The data folder or its database cannot be written."""


class StoreLocked(StoreError):
    """Another process holds the data folder."""

    retriable = True


class StoreUnavailable(StoreError):
    """The server that holds the store does not answer, or answers with an error of its own."""

    retriable = True


class StoreCorrupt(StoreError):
    """A page or a file is not what was written."""


class SchemaTooNew(StoreError):
    """The data folder was written by a newer version of whisper-fast."""


class LLMError(WhisperFastError):
    """The language model gave no usable answer; `status` is its HTTP status where there was one.

    `outage` says whether the server failed, as opposed to the request.
    """

    status: int | None = None
    outage = False

    def __init__(self, message: str, *, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message, retry_after=retry_after)
        if status is not None:
            self.status = status


class LLMUnavailable(LLMError):
    """Nobody answers at the endpoint's address, or it answered with a server error."""

    retriable = True
    outage = True


class LLMRateLimited(LLMError):
    """The endpoint answered 429."""

    retriable = True


class LLMTimeout(LLMError, TimeoutError):
    """The endpoint did not answer in the time given."""

    retriable = True
    outage = True


class LLMRejected(LLMError):
    """The endpoint refused the request; asking again with the same request will not help."""

    final = True


class LLMMisconfigured(LLMRejected):
    """The endpoint refused the key, the account or the address, not what was said to it (401, 402, 403, 404).

    The call fails at once; a message is kept and tried again, for whoever runs the server can mend it.
    """

    final = False
    mendable = True
    retry_after = 30.0


class LLMProtocolError(LLMError):
    """What the endpoint answered is not the OpenAI protocol."""

    retriable = True
    outage = True


def described(error: BaseException) -> str:
    """Return what a log may say of an error: never words that a user may have written.

    A model's server and foreign code may quote them, so of the one there is the status, of the other the lines that
    led to it, the innermost first.
    """
    name = type(error).__name__
    if isinstance(error, LLMError):
        return f"{name}: status {error.status}"
    if isinstance(error, WhisperFastError):
        return f"{name}: {error}"
    lines = reversed(extract_tb(error.__traceback__)[-LINES_TOLD:])
    return " < ".join([name, *(f"{line.name} ({PurePath(line.filename).name}:{line.lineno})" for line in lines)])


def own_copy(error: BaseException) -> BaseException:
    """Return an equal error with the same traceback so far: each waiter of a shared failure raises its own.

    A future refuses to carry StopIteration; it becomes a RuntimeError, as it does in a coroutine.
    """
    if isinstance(error, StopIteration):
        twin: BaseException = RuntimeError(f"raised StopIteration({error.value!r:.100})")
    else:
        twin = _twin(error)
    twin.__cause__, twin.__suppress_context__ = error.__cause__, error.__suppress_context__
    return twin.with_traceback(error.__traceback__)


def _twin(error: BaseException) -> BaseException:
    try:
        twin = copy(error)
    except Exception:  # noqa: BLE001 - the constructor of a foreign class may want other arguments, and raise anything
        twin = error
    if twin is error or type(twin) is not type(error):
        twin = type(error).__new__(type(error), *error.args)
        twin.__dict__.update(error.__dict__)
    return twin
