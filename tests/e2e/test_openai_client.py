"""The official client against a started server: real processes, the bundled model, one port."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator

import openai
import pytest

START_TIMEOUT_S = 90
MODEL = "holdfast-tiny"
QUESTION = [{"role": "user", "content": "What is a list in Python?"}]


class Server:
    """`holdfast serve` on a port of its own choice, with two api processes."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "holdfast", "serve", "--port", "0", "--threads", "1"]
        command += ["--kv-pages", "2000", "--max-rows", "32", "--api-processes", "2"]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "COLUMNS": "100"},
        )
        self.said: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(START_TIMEOUT_S), "".join(self.said)
        line = next(line for line in self.said if "http://" in line)
        self.url = "http://" + line.split("http://")[1].split()[0].strip().rstrip("/")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if "curl" in line:
                self._ready.set()

    def metric(self, name: str) -> float:
        """Sum over labels of one metric, as /metrics says it now."""
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=10).read().decode()
        values = [
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if line.startswith((f"holdfast_{name} ", f"holdfast_{name}{{"))
        ]
        assert values, f"no metric {name}"
        return sum(values)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    started = Server()
    yield started
    assert started.stop() == 0, "".join(started.said)


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)  # between two looks at a condition, not instead of one


def test_chat_answers_in_the_model_s_own_words_and_stops_by_itself(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0.0, max_completion_tokens=200
    )
    assert "list" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 200


def test_a_stream_is_the_answer_in_pieces_with_usage_last(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "messages": QUESTION, "temperature": 0.0, "max_tokens": 60}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert sum(bool(c.choices and c.choices[0].finish_reason) for c in chunks) == 1


def test_a_repeated_prompt_reports_cached_tokens(client: openai.OpenAI) -> None:
    text = "Tables and indexes of a database are kept in pages of a fixed size. " * 4
    for turn in range(2):
        answer = client.completions.create(model=MODEL, prompt=text, max_tokens=2)
        if turn:
            assert answer.usage.prompt_tokens_details.cached_tokens >= 16


def test_the_same_seed_draws_the_same_text_alone_and_in_company(client: openai.OpenAI) -> None:
    # A bare word and a high temperature: the model is too sure of its answers to vary in a chat.
    asked = {"model": MODEL, "prompt": "The", "temperature": 1.5, "seed": 7, "max_tokens": 40}
    alone = client.completions.create(**asked).choices[0].text

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none") as many:
            others = [
                many.completions.create(**(asked | {"seed": seed})) for seed in range(100, 115)
            ]
            same = many.completions.create(**asked)
            found = await asyncio.gather(same, *others)
            return [one.choices[0].text for one in found]

    texts = asyncio.run(together())
    assert texts[0] == alone
    assert len(set(texts)) > 1


def test_n_choices_differ_and_carry_their_indexes(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="The", n=3, temperature=1.5, seed=1, max_tokens=30
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) == 3


def test_logprobs_are_of_the_tokens_said_and_sorted(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0.0, max_tokens=8, logprobs=True, top_logprobs=3
    )
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 8
    for entry in entries:
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True) and len(values) == 3
        assert entry.logprob == values[0] <= 0.0, "greedy says the most likely"


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "messages": QUESTION, "temperature": 0.0, "max_tokens": 60}
    text = client.chat.completions.create(**asked).choices[0].message.content
    stop = text[20:27]
    cut = client.chat.completions.create(**asked, stop=[stop])
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("changes", "error", "param"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "model"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"n": 1000}, openai.BadRequestError, "n"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "max_tokens"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"logit_bias": {"999999": 1}}, openai.BadRequestError, "logit_bias"),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            openai.BadRequestError,
            "tools",
        ),
        ({"extra_body": {"no_such_field": 1}}, openai.BadRequestError, "no_such_field"),
    ],
)
def test_an_error_names_its_field(client: openai.OpenAI, changes, error, param) -> None:
    asked = {"model": MODEL, "messages": QUESTION, "max_tokens": 4} | changes
    with pytest.raises(error) as caught:
        client.chat.completions.create(**asked)
    assert caught.value.body["param"].startswith(param)


def test_a_deadline_is_a_504_before_the_first_token(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "word " * 3000}],
            max_tokens=4,
            extra_body={"timeout": 0.001},
        )
    assert caught.value.status_code == 504
    assert caught.value.body["code"] == "deadline"


def test_a_client_that_goes_away_frees_its_pages(server: Server, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL,
        prompt="One, two, three,",
        max_tokens=3000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    # Gauges are published every few steps: the first token may be here before the first of them.
    until(lambda: server.metric("pages_held") > 0, "the stream holds pages")
    stream.close()
    until(lambda: server.metric("pages_held") == 0, "pages of the closed stream are free")


def test_two_hundred_streams_with_random_aborts_end_with_all_pages_free(server: Server) -> None:
    rng = random.Random(5)
    ended = {"whole": 0, "aborted": 0}

    async def one(client: openai.AsyncOpenAI, number: int) -> None:
        wanted = rng.randint(1, 40)
        abort_after = rng.randint(0, wanted) if rng.random() < 0.5 else None
        stream = await client.completions.create(
            model=MODEL,
            prompt=f"Request {number}: " + "a table of the database " * rng.randint(1, 20),
            max_tokens=wanted,
            stream=True,
            temperature=rng.choice([0.0, 1.0]),
            extra_body={"ignore_eos": True},
        )
        seen = 0
        async for _ in stream:
            seen += 1
            if abort_after is not None and seen > abort_after:
                await stream.close()
                ended["aborted"] += 1
                return
        ended["whole"] += 1

    async def all_of_them() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            await asyncio.wait_for(
                asyncio.gather(*[one(client, number) for number in range(200)]), 120
            )

    asyncio.run(all_of_them())
    assert ended["whole"] + ended["aborted"] == 200
    assert min(ended.values()) > 20
    until(
        lambda: server.metric("pages_held") == 0 and server.metric("requests_waiting") == 0,
        "every page is free and nobody waits",
    )
    assert server.metric("digest_mismatches_total") == 0


def test_ready_and_metrics_tell_of_the_work_done(server: Server) -> None:
    assert json.load(urllib.request.urlopen(f"{server.url}/ready", timeout=10))
    assert server.metric("tokens_generated_total") > 100
    assert server.metric("steps_total") > 10
    assert server.metric("brain_seconds_count") > 10
