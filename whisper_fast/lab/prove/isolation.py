"""Promise 4: no user sees another's memory, answer or error text, and what was told in private stays there.

Every user has a word that nobody else ever says (`users.word`), and tells something in each scope, marked with a word
of that scope. Users then ask, in every scope, for their own things and for other people's words: through the memory
itself, and through whole turns with caches, batches, streams and failures. A leak is an answer, prompt, stream, error
or cached turn that holds a word which its user, in that scope, may not hear, a memory that is kept for somebody else,
a text that got another's vector in a batch, and any log line, of any logger, with such a word in it or in its
traceback.

    asked in            may hear what was told in
    dm                  dm, global, every server's public channels
    server:X/private    server:X/private, server:X/public, global
    server:X/public     server:X/public, global
    global              global
"""

from __future__ import annotations

import asyncio
import logging
import re
import traceback
from contextlib import contextmanager
from random import Random
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from ...engine import Engine
from ...errors import LLMRejected, WhisperFastError
from ...llm import SimulatedLLM
from ...message import Message
from ...settings import Settings
from ..users import word
from .proof import Proof

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from ...llm.completion import Completion
    from ...message import ChatMessage, Recalled, Turn
    from .proof import Show

__all__ = ["Isolation"]

K = TypeVar("K")

MAY_HEAR = {
    "dm": {"dm", "global", "server:1/public", "server:2/public"},
    "server:1/private": {"server:1/private", "server:1/public", "global"},
    "server:1/public": {"server:1/public", "global"},
    "server:2/private": {"server:2/private", "server:2/public", "global"},
    "server:2/public": {"server:2/public", "global"},
    "global": {"global"},
}
SCOPES = tuple(MAY_HEAR)
MARKS = {f"mark{number}kram": scope for number, scope in enumerate(SCOPES)}
MARK_OF = {scope: mark for mark, scope in MARKS.items()}
CANARY = re.compile(r"zq\d+qz|mark\d+kram")
PLACES = ("recalls", "prompts", "replies", "streams", "errors", "caches", "batches", "logs")
LOOKED_AT = 64  # entries of each cache, after each talk
AT_ONCE = 256  # recalls, or turns
TURNS_SHARE = 200  # recalls for each turn


class Parrot(SimulatedLLM):
    """A model that repeats its whole prompt; now and then it refuses, and repeats it in the error."""

    def __init__(self, proof: Isolation) -> None:
        super().__init__(latency=0.0)
        self._proof = proof
        self._calls = 0

    async def chat(self, messages: Sequence[ChatMessage], **params: Any) -> Completion:
        """Hold the prompt against its user, and answer."""
        self._calls += 1
        whole = " ".join(str(message["content"]) for message in messages)
        user, scope = messages[-1]["content"].split()[:2]
        self._proof.hold(whole, int(user), scope, "prompts")
        if self._calls % 50 == 0:
            raise LLMRejected(f"I will not answer {whole}", status=400)
        if self._calls % 50 == 25:
            raise RuntimeError(f"I cannot answer {whole}")
        return await super().chat(messages, **params)


class Eavesdropper(logging.Handler):
    """Counts log lines that hold any canary word, in their traceback too: a log belongs to nobody."""

    def __init__(self, proof: Isolation) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(name)s %(message)s"))
        self._proof = proof

    def emit(self, record: logging.LogRecord) -> None:
        """Look at a line."""
        self._proof.seen["logs"] += 1
        self._proof.leaks["logs"] += bool(CANARY.search(self.format(record)))


@contextmanager
def overheard(proof: Isolation) -> Iterator[None]:
    """Look at whatever any logger of this process says, down to its least word."""
    ears, root, ours = Eavesdropper(proof), logging.getLogger(), logging.getLogger("whisper_fast")
    before = root.level, ours.level, ours.propagate
    root.addHandler(ears)
    root.setLevel(logging.DEBUG)
    ours.setLevel(logging.DEBUG)
    ours.propagate = True
    try:
        yield
    finally:
        root.removeHandler(ears)
        root.setLevel(before[0])
        ours.setLevel(before[1])
        ours.propagate = before[2]


class Isolation(Proof):
    """`recalls` recalls and a two-hundredth as many turns, by `users` users."""

    name = "isolation"
    must_be_zero = ("leaks",)
    must_not_be_zero = ("memories_found", *(f"looked_at.{place}" for place in PLACES))

    def __init__(
        self, users: int = 1000, recalls: int = 50_000, seed: int = 0, engine: type[Engine] = Engine
    ) -> None:
        self.arguments = f"--users {users} --recalls {recalls} --seed {seed}"
        self.users = users
        self.recalls = recalls
        self.seed = seed
        self._engine = engine
        self._random = Random(seed)
        self.seen = dict.fromkeys(PLACES, 0)
        self.leaks = dict.fromkeys(PLACES, 0)
        self._found = 0
        self._began = perf_counter()

    async def run(self, folder: Path, show: Show) -> None:
        """Tell, then recall and talk."""
        self._began = perf_counter()
        settings = Settings(data_dir=folder, process_pool_size=1, max_wait_seconds=3600.0, max_waiting=1_000_000)
        with overheard(self):
            async with self._engine.open(settings, llm=Parrot(self)) as engine:
                engine.component("ill", ill)
                await self._tell(engine)
                while self.seen["recalls"] < self.recalls:
                    await self._recall(engine)
                    if self._due():
                        await self._talk(engine)
                        self._look_inside(engine)
                    show(self.seen["recalls"] / self.recalls, f"{self.seen['recalls']} recalls")

    def figures(self) -> dict[str, Any]:
        """Return recalls, leaks; how much was looked at and what leaked, by place; memories found."""
        return {
            "recalls": self.seen["recalls"],
            "leaks": sum(self.leaks.values()),
            "looked_at": dict(self.seen),
            "leaked": {place: count for place, count in self.leaks.items() if count},
            "memories_found": self._found,
            "users": self.users,
            "seconds": round(perf_counter() - self._began, 1),
            "seed": self.seed,
        }

    def hold(self, text: str, user: int, scope: str, place: str) -> None:
        """Count a text that `user` sees in `scope`; it leaks if it holds a word that is not for them."""
        self.seen[place] += 1
        allowed = MAY_HEAR[scope]
        own = word(user)
        for found in CANARY.findall(text):
            if found != own and not (found in MARKS and MARKS[found] in allowed):
                self.leaks[place] += 1
                return

    def _due(self) -> bool:
        turns = self.seen["replies"] + self.seen["streams"] + self.seen["errors"]
        return turns * TURNS_SHARE < self.seen["recalls"]

    async def _tell(self, engine: Engine) -> None:
        for user in range(self.users):
            told = [
                {"text": f"my {thing} is called {word(user)} {MARK_OF[scope]}", "scope": scope}
                for scope in SCOPES
                for thing in ("cat", "boat")
            ]
            await engine.memory.add_many(f"u{user}", told)

    async def _recall(self, engine: Engine) -> None:
        """Ask for many users at once; what comes back must be the asker's own, told where it may be heard."""
        scope = self._random.choice(SCOPES)
        count = min(AT_ONCE, self.recalls - self.seen["recalls"])
        asking = [self._random.randrange(self.users) for _ in range(count)]
        questions = [(f"u{user}", f"what is the {self._thing()} of {self._somebody()}") for user in asking]
        answers = await engine.memory.recall_many(questions, scope=scope)
        for user, found in zip(asking, answers, strict=True):
            self.seen["recalls"] += 1
            self._found += len(found)
            self.leaks["recalls"] += not all(fits(memory, user, scope) for memory in found)

    def _thing(self) -> str:
        return self._random.choice(("cat", "boat"))

    def _somebody(self) -> str:
        return word(self._random.randrange(self.users))

    async def _talk(self, engine: Engine) -> None:
        """Let many users write at the same moment, some with the same id, some streaming, with flags as they fall."""
        for flag in ("parallel", "batching", "caching"):
            setattr(engine.flags, flag, self._random.random() < 0.8)
        await asyncio.gather(*(self._turn(engine) for _ in range(AT_ONCE)))

    def _look_inside(self, engine: Engine) -> None:
        """Look at some of what is kept in memory: turns, memories, and the vectors that came out of batches."""
        turns, segments = engine._conversations.cache, engine.memory.caches()["segments"]
        for key in self._some(turns.keys()):
            for one in turns.get(key) or ():
                for message in one.messages:
                    self.hold(str(message["content"]), int(key[0][1:]), key[3], "caches")
        for name in self._some(segments.keys()):
            if (segment := segments.get(name)) is not None:
                kept = segment.recalled((row, 0.0) for row in range(len(segment)))
                self.seen["caches"] += 1
                self.leaks["caches"] += not all(word(int(name[1:])) in memory.text for memory in kept)
        vectors = engine.memory._embed._questions
        for text in self._some(vectors.keys()):
            if (vector := vectors.get(text)) is not None:
                self.seen["batches"] += 1
                self.leaks["batches"] += not np.allclose(vector, alone(engine, text), atol=1e-5)

    def _some(self, keys: list[K]) -> list[K]:
        return self._random.sample(keys, min(LOOKED_AT, len(keys)))

    async def _turn(self, engine: Engine) -> None:
        user, scope = self._random.randrange(self.users), self._random.choice(SCOPES)
        text = f"{user} {scope} what is the {self._thing()} of {word(user)} {MARK_OF[scope]}"
        name = f"same-{self._random.randrange(1000)}-{scope}"
        message = Message(user=f"u{user}", text=text, id=name, channel="lab", platform="lab", scope=scope)
        try:
            if self._random.random() < 0.3:
                pieces = [piece async for piece in engine.stream(message)]
                self.hold("".join(pieces), user, scope, "streams")
            else:
                reply = await engine.respond(message)
                self.hold(reply.text + " ".join(memory.text for memory in reply.memories), user, scope, "replies")
        except (WhisperFastError, RuntimeError) as error:  # the second kind is the model's own
            self.hold("".join(traceback.format_exception(error)), user, scope, "errors")


def ill(turn: Turn) -> str:
    """Fail now and then as a bot's own component may, and quote what it was given."""
    if turn.message.id.endswith(("3", "3-dm")):
        raise ValueError(f"cannot weigh {turn.message.text}")
    return ""


def alone(engine: Engine, text: str) -> NDArray[np.float32]:
    """Return the vector of a text that is in no batch."""
    [vector] = cast("NDArray[np.float32]", engine.embedder.embed([text]))
    return cast("NDArray[np.float32]", vector)


def fits(memory: Recalled, user: int, scope: str) -> bool:
    """Say whether a memory is the user's own, and told where it may be heard in `scope`."""
    *_, name, mark = memory.text.split()
    return name == word(user) and MARKS.get(mark) in MAY_HEAR[scope]
