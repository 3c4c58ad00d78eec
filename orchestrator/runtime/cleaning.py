"""Dropping what only a continuation needs, from checkpoints that no trial goes on from."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path

from orchestrator.plan.results import RungResult
from orchestrator.runtime.ledger import drop_optimizer_state


class Cleaner:
    """Works beside the exchange, one folder after another: a folder has one writer at a time.

    Args:
        tell: Called with a sentence for each checkpoint that could not be cleaned.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._outdated: asyncio.Queue[Path] = asyncio.Queue()
        self._task: asyncio.Task | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._clean())

    def drop_optimizer_states(self, results: Iterable[RungResult]) -> None:
        """These rungs keep their adapter or delta alone, soon."""
        for result in results:
            if result.checkpoint is not None:
                self._outdated.put_nowait(Path(result.checkpoint))

    async def join(self) -> None:
        """Until everything asked for has been done."""
        await self._outdated.join()

    async def close(self) -> None:
        if self._task is not None:
            await self.join()
            self._task.cancel()

    async def _clean(self) -> None:
        while True:
            checkpoint = await self._outdated.get()
            try:
                await asyncio.to_thread(drop_optimizer_state, checkpoint)
            except Exception as error:  # whatever it is: `close` waits until everything asked for has been looked at
                self._tell(f"{checkpoint} keeps its optimizer state: {error}")
            finally:
                self._outdated.task_done()
