from asyncio import Task
from collections.abc import Coroutine
from typing import Any, final

__all__ = ["Eager"]

@final
class Eager:
    def start(self, coroutine: Coroutine[Any, Any, Any], name: str, /) -> tuple[Any, Task[Any] | None]: ...
    async def close(self) -> None: ...
