"""The engine stops while a message is on its way to the disk: it is kept, and its sender is told so."""

import asyncio

import pytest
from scripted import said

from whisper_fast import Engine, Settings
from whisper_fast.errors import Closed
from whisper_fast.lab.audit import audit
from whisper_fast.llm import SimulatedLLM


@pytest.mark.parametrize("caller_stays", [True, False])
async def test_a_message_that_reaches_the_disk_after_the_stop_is_kept(tmp_path, caller_stays):
    settings = Settings(data_dir=tmp_path, drain_seconds=0.001, process_pool_size=1)
    reached, problems = asyncio.Event(), []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    async with Engine.open(settings, llm=SimulatedLLM(0)) as engine:
        accept = engine._journal.accept

        def late(message, body):
            future, then = accept(message, body), asyncio.get_running_loop().create_future()
            reached.set()

            async def hand_over():
                entry = await future
                while not engine._lanes.closed or engine._lanes.places:
                    await asyncio.sleep(0.001)
                then.set_result(entry)

            then.task = asyncio.create_task(hand_over(), name="late")
            return then

        engine._journal.accept = late
        sending = asyncio.create_task(engine.respond(said("ada", "hi", id="1")), name="sending")
        await reached.wait()
        if not caller_stays:
            sending.cancel()
    [ended] = await asyncio.gather(sending, return_exceptions=True)
    assert isinstance(ended, Closed if caller_stays else asyncio.CancelledError)
    assert problems == []
    assert audit(tmp_path)["open"] == 1
