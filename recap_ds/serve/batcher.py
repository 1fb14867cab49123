"""Many clients, one model: what waits while the model computes goes into its next forward together.

Nobody waits for company: an idle model starts at once. One thread computes, so the event loop keeps answering pings.
"""

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from recap_ds.models.robot import ChunkRequest

Predict = Callable[[Sequence[ChunkRequest]], list[np.ndarray]]


class Answer(NamedTuple):
    actions: np.ndarray  # [H, A]
    wait_seconds: float  # for the model
    infer_seconds: float  # of the forward
    batch_size: int  # requests in it


class _Waiting(NamedTuple):
    request: ChunkRequest
    answer: asyncio.Future[Answer]
    since: float


class Batcher:
    """``async with Batcher(...) as batcher``: for as long as it is entered, requests are answered."""

    def __init__(self, predict: Predict, max_batch: int):
        self._predict, self._max_batch = predict, max_batch
        # True = the last request failed alone: an accelerator that has broken answers none of the next ones either.
        self.failing = False
        self._waiting: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def __aenter__(self) -> "Batcher":
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        # A forward that nobody waits for any more must not keep the event loop from signals.
        self._thread.shutdown(wait=False)

    async def ask(self, request: ChunkRequest) -> Answer:
        """Raises what the model raised for this request."""
        waiting = _Waiting(request, self._loop.create_future(), time.perf_counter())
        self._waiting.put_nowait(waiting)
        return await waiting.answer

    async def _run(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < self._max_batch and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            # Whoever has left needs no answer.
            await self._answer([each for each in batch if not each.answer.done()])

    async def _answer(self, batch: list[_Waiting]) -> None:
        if not batch:
            return
        begin = time.perf_counter()
        try:
            chunks = await self._loop.run_in_executor(self._thread, self._predict, [each.request for each in batch])
        except Exception as error:
            if len(batch) == 1:
                self.failing = True
                if not batch[0].answer.done():
                    batch[0].answer.set_exception(error)
                return
            # A request that breaks the model, or is one too many for its memory, harms nobody else.
            print(f"a forward of {len(batch)} requests failed ({error}); now one by one", file=sys.stderr, flush=True)
            for each in batch:
                await self._answer([each])
            return
        self.failing = False
        infer_seconds = time.perf_counter() - begin
        for each, actions in zip(batch, chunks, strict=True):
            if not each.answer.done():
                each.answer.set_result(Answer(actions, begin - each.since, infer_seconds, len(batch)))
