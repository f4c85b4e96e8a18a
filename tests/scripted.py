"""A language model that follows a script, and the few words that the engine's tests say over and over."""

import asyncio

from whisper_fast import Message
from whisper_fast.llm import SimulatedLLM
from whisper_fast.llm.completion import Completion
from whisper_fast.message import Delta


def quick():
    return SimulatedLLM(latency=0.001)


class ScriptedLLM:
    """Answers by a function of the messages; keeps what it was asked."""

    name = "scripted"

    def __init__(self, answer):
        self.answer = answer
        self.asked = []

    async def chat(self, messages, **_):
        self.asked.append(messages)
        answer = self.answer(messages)
        return Completion(text=await answer if asyncio.iscoroutine(answer) else answer)

    async def stream(self, messages, **parameters):
        for word in (await self.chat(messages, **parameters)).text.split(" "):
            yield Delta(word)

    async def close(self):
        pass


def said(user, text, **fields):
    return Message(user=user, text=text, **fields)


async def until(condition):
    """Wait until `condition()` holds; a test that waits for what never comes fails."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)
