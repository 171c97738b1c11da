"""`stream` and `astream`: the number at once, then the words, and an end whenever the caller wants one."""

import asyncio
import threading

import pytest
import torch

from clsgen.explaining_clsgen import STREAM_THREAD


@pytest.mark.parametrize("mode", ["guided", "free"])
def test_streams_give_the_number_then_the_words_then_both(any_model, texts, mode):
    whole = any_model.classify_and_explain(texts[2], mode=mode, max_new_tokens=10)
    first, *pieces, last = any_model.stream(texts[2], mode=mode, max_new_tokens=10)
    assert first.explanation is None
    assert first.probability == last.probability == pytest.approx(whole.probability, abs=1e-4)
    assert "".join(pieces).strip() == last.explanation == whole.explanation
    assert last.lm_probability == first.lm_probability == whole.lm_probability

    async def collect():
        return [event async for event in any_model.astream(texts[2], mode=mode, max_new_tokens=10)]

    assert asyncio.run(collect()) == [first, *pieces, last]


def test_a_stream_that_is_closed_stops_generating(model):
    letter, space = model.tokenizer.convert_tokens_to_ids(["a", "Ġ"])

    def words(input_ids, scores):  # a random model's bytes are hardly ever text that a streamer lets through
        wanted = letter if input_ids[0, -1] == space else space
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([wanted]), 0.0)

    steps = []
    model.lm.register_forward_hook(lambda *_: steps.append(1))
    events = model.stream("One text", max_new_tokens=1500, logits_processor=[words])
    next(events)
    assert next(events).strip() == "a"
    events.close()
    assert len(steps) < 1000
    assert not any(thread.name == STREAM_THREAD for thread in threading.enumerate())


@pytest.mark.parametrize("words_before", [0, 2])
def test_an_asynchronous_stream_whose_wait_is_cancelled_ends_the_generation(model, words_before):
    letter, space = model.tokenizer.convert_tokens_to_ids(["a", "Ġ"])
    steps, stuck, go_on = [], threading.Event(), threading.Event()

    def words(input_ids, scores):
        steps.append(1)
        if len(steps) > 2 * words_before:
            stuck.set()
            go_on.wait(30)
        wanted = letter if input_ids[0, -1] == space else space
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([wanted]), 0.0)

    async def read():
        async for _ in model.astream("One text", max_new_tokens=1500, logits_processor=[words]):
            pass

    async def run():
        reading = asyncio.create_task(read())
        await asyncio.to_thread(stuck.wait, 30)
        await asyncio.sleep(0.1)
        reading.cancel()
        await asyncio.sleep(0.1)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await reading

    asyncio.run(run())
    assert len(steps) < 1000
    assert not any(thread.name == STREAM_THREAD for thread in threading.enumerate())


def test_a_stream_refuses_bad_input_at_once_and_passes_failures_on(model):
    with pytest.raises(ValueError, match="is empty"):
        model.stream(" ")
    with pytest.raises(ValueError, match="nonsense"):
        list(model.stream("text", nonsense=3))
