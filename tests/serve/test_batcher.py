"""Batching: what waits goes together, and one request's trouble is its own."""

import asyncio

import numpy as np

from recap_ds.serve.batcher import Batcher


class Model:
    """Answers request n with n, in the model's thread; ``hold`` keeps the first forward until it is let go."""

    def __init__(self, bad: tuple[int, ...] = ()):
        self.bad, self.batches = bad, []
        self.hold: asyncio.Event | None = None

    def __call__(self, requests):
        self.batches.append(list(requests))
        if self.hold is not None and len(self.batches) == 1:
            asyncio.run_coroutine_threadsafe(self.hold.wait(), self.loop).result(timeout=10)
        if set(requests) & set(self.bad):
            raise RuntimeError("out of memory")
        return [np.full((1, 1), request) for request in requests]


async def ask_behind_a_running_forward(model, max_batch, numbers):
    """The first request is computed alone while the others arrive."""
    model.hold, model.loop = asyncio.Event(), asyncio.get_running_loop()
    async with Batcher(model, max_batch) as batcher:
        tasks = [asyncio.ensure_future(batcher.ask(number)) for number in numbers]
        while not model.batches:
            await asyncio.sleep(0.001)
        model.hold.set()
        return await asyncio.gather(*tasks, return_exceptions=True)


def test_what_waits_is_computed_together_and_no_more_than_the_limit():
    model = Model()
    answers = asyncio.run(ask_behind_a_running_forward(model, 3, range(6)))
    # All six had arrived before the first forward began; it took as many as it may.
    assert model.batches == [[0, 1, 2], [3, 4, 5]]
    assert [int(answer.actions[0, 0]) for answer in answers] == list(range(6))
    assert [answer.batch_size for answer in answers] == [3] * 6
    assert all(answer.infer_seconds > 0 for answer in answers)


def test_a_request_that_breaks_the_model_harms_no_other(capsys):
    model = Model(bad=(2,))
    answers = asyncio.run(ask_behind_a_running_forward(model, 8, range(4)))
    assert model.batches == [[0, 1, 2, 3], [0], [1], [2], [3]]
    assert [int(answers[number].actions[0, 0]) for number in (0, 1, 3)] == [0, 1, 3]
    assert isinstance(answers[2], RuntimeError)
    assert capsys.readouterr().err == "a forward of 4 requests failed (out of memory); now one by one\n"


def test_whoever_has_left_is_not_computed():
    model = Model()

    async def scenario():
        model.hold, model.loop = asyncio.Event(), asyncio.get_running_loop()
        async with Batcher(model, 1) as batcher:
            tasks = [asyncio.ensure_future(batcher.ask(number)) for number in range(3)]
            while not model.batches:
                await asyncio.sleep(0.001)
            tasks[1].cancel()
            await asyncio.sleep(0)
            model.hold.set()
            return await asyncio.gather(*tasks, return_exceptions=True)

    first, left, last = asyncio.run(scenario())
    assert model.batches == [[0], [2]] and isinstance(left, asyncio.CancelledError)
    assert (int(first.actions[0, 0]), int(last.actions[0, 0])) == (0, 2)


def test_an_idle_model_starts_at_once():
    model = Model()

    async def scenario():
        async with Batcher(model, 1) as batcher:
            return await batcher.ask(5)

    answer = asyncio.run(scenario())
    assert (answer.actions[0, 0], answer.batch_size) == (5, 1)
