"""What is remembered of real conversations told through the door, after two kill -9: recall@10 of LoCoMo's evidence.

    python benches/door_recall.py

Starts the server as a process of its own, tells the five conversations turn by turn
(each is one user; a turn is "Name: text"), kills the server with -9 in the middle, starts it again, sends again what
was not acknowledged, kills it once more at the end, and asks every question that names its evidence. A question's
recall is the share of its evidence turns among the ten memories of the answer; the figure is the mean. Needs the
conversations in WHISPER_FAST_DATA (default: ../shared/data beside the repository), says so where they are absent.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import aiohttp
from aiohttp import web

DATA = Path(os.environ.get("WHISPER_FAST_DATA", Path(__file__).parents[2] / "shared" / "data")) / "locomo"
GOAL = 0.60


class Server:
    """A child process that serves, on the same port each time it is started."""

    def __init__(self, **environment: str) -> None:
        self.command = Path(sys.executable).with_name("whisper-fast")
        self.environment = {**os.environ, **environment}

    async def start(self, port: int) -> Server:
        quiet = asyncio.subprocess.DEVNULL
        self.process = await asyncio.create_subprocess_exec(
            self.command, "serve", env=self.environment, stdout=quiet, stderr=quiet
        )
        async with aiohttp.ClientSession() as session:
            while True:
                try:
                    async with session.get(f"http://127.0.0.1:{port}/v1/models"):
                        return self
                except aiohttp.ClientError:
                    if self.process.returncode is not None:
                        raise SystemExit(f"{self.command} serve ended with {self.process.returncode}") from None
                    await asyncio.sleep(0.05)

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


async def listener() -> tuple[web.AppRunner, str]:
    """Start a language model that listens and says nothing of its own, so that only what was told can be recalled."""

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "listener", "object": "model"}]})

    async def complete(_: web.Request) -> web.Response:
        choice = {"index": 0, "message": {"role": "assistant", "content": "I see."}, "finish_reason": "stop"}
        return web.json_response({"id": "1", "object": "chat.completion", "model": "listener", "choices": [choice]})

    app = web.Application()
    app.add_routes([web.get("/v1/models", models), web.post("/v1/chat/completions", complete)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}/v1"


class Conversation:
    """One LoCoMo conversation: its turns in order, and the questions that name the turns they rest on."""

    def __init__(self, path: Path) -> None:
        content = json.loads(path.read_text())
        self.user = path.stem
        self.turns: dict[str, str] = {}
        for number in range(1, 100):
            for turn in content.get(f"session_{number}", ()):
                self.turns[turn["dia_id"]] = f"{turn['speaker']}: {turn['text']}"
        self.questions = [(qa["question"], self.evidence(qa)) for qa in content["qa"]]
        self.questions = [(question, evidence) for question, evidence in self.questions if evidence]

    def evidence(self, qa: dict) -> set[str]:
        named = re.findall(r"D\d+:\d+", str(qa.get("evidence", "")))
        return {self.turns[name] for name in named if name in self.turns}


async def ask(
    session: aiohttp.ClientSession, url: str, user: str, text: str, key: str = "", store: bool = True
) -> dict:
    body = {"model": "whisper-fast", "messages": [{"role": "user", "content": text}], "store": store}
    headers = {"X-User-Id": user, **({"Idempotency-Key": key} if key else {})}
    async with session.post(f"{url}/v1/chat/completions", json=body, headers=headers) as answer:
        answer.raise_for_status()
        return await answer.json()


async def tell(session, url: str, conversation: Conversation, told: set[str], until: float) -> None:
    """Tell the turns that were not acknowledged yet, up to the share `until` of all."""
    names = list(conversation.turns)
    for name in names[: int(len(names) * until)]:
        if name not in told:
            await ask(session, url, conversation.user, conversation.turns[name], key=name)
            told.add(name)


async def recall(session, url: str, conversation: Conversation) -> list[float]:
    found = []
    for question, evidence in conversation.questions:
        answer = await ask(session, url, conversation.user, question, store=False)
        memories = {memory["text"] for memory in answer["whisper_fast"]["memories"]}
        found.append(len(evidence & memories) / len(evidence))
    return found


async def measure(folder: str) -> dict[str, list[float]]:
    conversations = [Conversation(path) for path in sorted(DATA.glob("*.json"))]
    model, model_url = await listener()
    port = 18_766
    url = f"http://127.0.0.1:{port}"
    server = Server(WHISPER_FAST_DATA_DIR=folder, WHISPER_FAST_PORT=str(port), LLM_CHAT_API_URL=model_url)
    told: dict[str, set[str]] = {conversation.user: set() for conversation in conversations}
    try:
        for until in (0.5, 1.0):
            await server.start(port)
            async with aiohttp.ClientSession() as session:
                telling = [
                    asyncio.create_task(tell(session, url, c, told[c.user], until + 0.1)) for c in conversations
                ]
                while sum(map(len, told.values())) < until * sum(len(c.turns) for c in conversations):
                    await asyncio.wait(telling, timeout=0.01, return_when=asyncio.FIRST_EXCEPTION)
                await server.kill()
                await asyncio.gather(*telling, return_exceptions=True)
            print(f"killed with -9 after {sum(map(len, told.values()))} acknowledged turns", file=sys.stderr)
        await server.start(port)
        async with aiohttp.ClientSession() as session:
            found = await asyncio.gather(*(recall(session, url, c) for c in conversations))
    finally:
        await server.kill()
        await model.cleanup()
    return {c.user: shares for c, shares in zip(conversations, found, strict=True)}


def main() -> None:
    if not DATA.is_dir():
        raise SystemExit(f"skipped: {DATA} is not there; name the folder of the conversations in WHISPER_FAST_DATA")
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(folder))
    for user, shares in found.items():
        print(f"conversation {user}: recall@10 {sum(shares) / len(shares):.3f} over {len(shares)} questions")
    every = [share for shares in found.values() for share in shares]
    mean = sum(every) / len(every)
    print(f"all: recall@10 {mean:.3f} over {len(every)} questions (at least {GOAL:.2f} is asked for)")
    sys.exit(mean < GOAL)


if __name__ == "__main__":
    main()
