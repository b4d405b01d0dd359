"""The HTTP surface over a scripted core: answers, streams, errors, disconnects, deadlines."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from apikit import END_ID, Kit, byte_fallback, events_of, kit, run, until
from prometheus_client.parser import text_string_to_metric_families

from holdfast.wire.messages import End, Ended, Refused, State


def text_of(events: list[Any], index: int = 0) -> str:
    parts = []
    for event in events:
        if isinstance(event, dict) and "choices" in event:
            for choice in event["choices"]:
                if choice["index"] == index:
                    parts.append(choice.get("text", "") or choice.get("delta", {}).get("content"))
    return "".join(part for part in parts if part)


@run
async def test_a_chat_answer_has_openais_shape_and_counts_its_tokens() -> None:
    async with kit() as k:
        k.says("Hello world")
        k.core.cached = 3
        answer = await k.chat(max_tokens=50)
        assert answer.status_code == 200
        body = answer.json()
        count = len(k.tokenizer.encode("Hello world"))
        assert body["object"] == "chat.completion"
        assert body["choices"][0]["message"] == {
            "role": "assistant",
            "content": "Hello world",
            "refusal": None,
        }
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == count
        assert body["usage"]["prompt_tokens"] == len(k.core.submits[0].prompt) // 4
        assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
        assert k.client.open == 0


@run
async def test_the_prompt_is_the_rendered_conversation_and_parts_are_joined_by_lines() -> None:
    async with kit() as k:
        messages = [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": t} for t in ("one", "two")]},
        ]
        await k.post("/v1/chat/completions", {"model": "tiny", "messages": messages})
        ids = list(memoryview(k.core.submits[0].prompt).cast("i"))
        assert k.tokenizer.decode(ids, skip_special=False) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\n"
        )


@run
async def test_a_stream_opens_with_the_role_ends_with_done_and_adds_up() -> None:
    async with kit() as k:
        k.says("Grüße 👩‍👩‍👧!")
        answer = await k.chat(stream=True, stream_options={"include_usage": True})
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = events_of(answer.text)
        assert events[-1] == "[DONE]"
        assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert text_of(events) == "Grüße 👩‍👩‍👧!"
        assert events[-3]["choices"][0]["finish_reason"] == "length"
        assert events[-2]["choices"] == []
        assert events[-2]["usage"]["completion_tokens"] > 0
        assert all(event["usage"] is None for event in events[:-2])
        assert "�" not in answer.text


@run
async def test_usage_is_not_in_a_stream_that_did_not_ask_for_it() -> None:
    async with kit() as k:
        events = events_of((await k.chat(stream=True)).text)
        assert all("usage" not in event for event in events[:-1])


@run
async def test_a_character_split_over_steps_is_sent_whole() -> None:
    async with kit(inner=byte_fallback(), template=None) as k:
        ids = [k.tokenizer.inner.token_to_id(f"<0x{byte:02X}>") for byte in "é👩".encode()]
        k.core.answer = lambda submit, choice: (ids, int(End.LENGTH))
        events = events_of((await k.complete(stream=True)).text)
        texts = [e["choices"][0]["text"] for e in events[:-1] if e["choices"][0]["text"]]
        assert texts == ["é", "👩"]


@run
async def test_an_unfinished_character_at_the_end_is_not_shown() -> None:
    async with kit(inner=byte_fallback(), template=None) as k:
        ids = [k.tokenizer.inner.token_to_id(f"<0x{byte:02X}>") for byte in "é👩".encode()[:4]]
        k.core.answer = lambda submit, choice: (ids, int(End.LENGTH))
        body = (await k.complete()).json()
        assert body["choices"][0]["text"] == "é"
        assert body["usage"]["completion_tokens"] == 4


@run
async def test_a_stop_string_split_over_tokens_is_cut_and_the_core_is_told_where() -> None:
    async with kit() as k:
        ids = [*k.tokenizer.encode("Hello"), *k.tokenizer.encode(" s"), *k.tokenizer.encode("top")]
        rest = k.tokenizer.encode(" and more")
        k.core.answer = lambda submit, choice: (ids + rest * 9, int(End.LENGTH))
        for stream in (False, True):
            answer = await k.chat(stop=["stop", "zzz"], stream=stream)
            if stream:
                assert text_of(events_of(answer.text)) == "Hello "
                assert events_of(answer.text)[-2]["choices"][0]["finish_reason"] == "stop"
            else:
                body = answer.json()
                assert body["choices"][0]["message"]["content"] == "Hello "
                assert body["choices"][0]["finish_reason"] == "stop"
                assert body["usage"]["completion_tokens"] == len(ids)
            await until(lambda: bool(k.core.finishes))
            assert k.core.finishes.pop()[1] == len(ids)
        assert not k.core.cancels
        kept = await k.chat(stop="stop", include_stop_str_in_output=True)
        assert kept.json()["choices"][0]["message"]["content"] == "Hello stop"


@run
async def test_stop_strings_before_min_tokens_do_not_count() -> None:
    async with kit() as k:
        k.core.answer = lambda s, c: (k.tokenizer.encode("a.b.c."), int(End.LENGTH))
        count = len(k.tokenizer.encode("a.b"))
        body = (await k.complete(stop=".", min_tokens=count + 1)).json()
        assert body["choices"][0]["text"] == "a.b"


@run
async def test_the_text_of_a_stop_id_is_not_shown_and_the_reason_is_stop() -> None:
    async with kit() as k:
        ids = [*k.tokenizer.encode("Hello"), END_ID]
        k.core.answer = lambda submit, choice: (ids, int(End.STOP))
        body = (await k.chat(skip_special_tokens=False)).json()
        assert body["choices"][0]["message"]["content"] == "Hello"
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["usage"]["completion_tokens"] == len(ids)


@run
async def test_choices_of_one_request_are_interleaved_and_each_adds_up() -> None:
    async with kit() as k:
        words = ["Hello", "world there", "fox"]
        k.core.answer = lambda s, choice: (k.tokenizer.encode(words[choice]), int(End.LENGTH))
        events = events_of((await k.chat(n=3, stream=True)).text)
        assert [text_of(events, at) for at in range(3)] == words
        roles = [e for e in events[:-1] if e["choices"][0]["delta"].get("role")]
        assert [e["choices"][0]["index"] for e in roles] == [0, 1, 2]
        body = (await k.chat(n=3)).json()
        assert [c["message"]["content"] for c in body["choices"]] == words
        assert len(set(k.core.submits[0].seeds)) == 3


@run
async def test_several_prompts_are_answered_in_order_with_n_choices_each() -> None:
    async with kit() as k:
        k.core.answer = lambda s, choice: (
            [*memoryview(s.prompt).cast("i"), 40 + choice],
            int(End.LENGTH),
        )
        prompts = ["fox", "dog", "lazy"]
        tail = [k.tokenizer.show(40)[0], k.tokenizer.show(41)[0]]
        expected = [p + t for p in prompts for t in tail]
        body = (await k.complete(prompts, n=2)).json()
        assert [c["text"] for c in body["choices"]] == expected
        assert [c["index"] for c in body["choices"]] == list(range(6))
        events = events_of((await k.complete(prompts, n=2, stream=True)).text)
        assert [text_of(events, at) for at in range(6)] == expected
        assert body["usage"]["prompt_tokens"] == sum(len(k.tokenizer.encode(p)) for p in prompts)
        ids = [k.tokenizer.encode(p) for p in prompts]
        assert [c["text"] for c in (await k.complete(ids, n=2)).json()["choices"]] == expected


@run
async def test_echo_shows_the_prompt_before_each_answer() -> None:
    async with kit() as k:
        k.says(" jumps")
        assert (await k.complete("fox", echo=True)).json()["choices"][0]["text"] == "fox jumps"
        ids = k.tokenizer.encode("fox")
        assert (await k.complete(ids, echo=True)).json()["choices"][0]["text"] == "fox jumps"
        events = events_of((await k.complete("fox", echo=True, stream=True)).text)
        assert text_of(events) == "fox jumps"


@run
async def test_logprobs_of_both_endpoints_have_openais_shapes() -> None:
    async with kit() as k:
        k.says("Hello fox")
        ids = k.tokenizer.encode("Hello fox")
        chat = (await k.chat(logprobs=True, top_logprobs=2)).json()["choices"][0]["logprobs"]
        assert "".join(entry["token"] for entry in chat["content"]) == "Hello fox"
        assert [len(entry["top_logprobs"]) for entry in chat["content"]] == [2] * len(ids)
        assert chat["content"][0]["logprob"] == -0.5
        assert bytes(chat["content"][0]["bytes"]).decode() == chat["content"][0]["token"]
        plain = (await k.complete(logprobs=2)).json()["choices"][0]["logprobs"]
        assert "".join(plain["tokens"]) == "Hello fox"
        assert plain["token_logprobs"] == [-0.5] * len(ids)
        lengths = [len(token) for token in plain["tokens"]]
        assert plain["text_offset"] == [sum(lengths[:at]) for at in range(len(ids))]
        assert all(len(top) in (2, 3) for top in plain["top_logprobs"])
        named = (await k.complete(logprobs=0, return_tokens_as_token_ids=True)).json()
        assert named["choices"][0]["logprobs"]["tokens"] == [f"token_id:{i}" for i in ids]
        streamed = events_of((await k.chat(logprobs=True, stream=True)).text)
        entries = [
            entry["token"]
            for event in streamed[:-1]
            for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
        ]
        assert "".join(entries) == "Hello fox"


@run
async def test_logprobs_do_not_leak_a_stop_string() -> None:
    async with kit() as k:
        ids = [*k.tokenizer.encode("fox"), *k.tokenizer.encode(" s"), *k.tokenizer.encode("top")]
        k.core.answer = lambda s, c: (ids, int(End.NONE))
        for stream in (False, True):
            answer = await k.chat(stop=" stop", logprobs=True, stream=stream)
            if stream:
                content = [
                    entry
                    for event in events_of(answer.text)[:-1]
                    for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
                ]
            else:
                content = answer.json()["choices"][0]["logprobs"]["content"]
            assert "".join(entry["token"] for entry in content) == "fox"


@run
async def test_seed_and_priority_and_tenant_reach_the_core() -> None:
    async with kit(api_keys=("secret-1", "secret-2")) as k:
        heads = {"authorization": "Bearer secret-2"}
        await k.http.post(
            "/v1/completions",
            json={"model": "tiny", "prompt": "x", "seed": 42, "priority": 5, "timeout": 7},
            headers=heads,
        )
        submit = k.core.submits[0]
        assert submit.seeds == (42,)
        assert submit.priority == 5
        assert 6.5 < submit.deadline_s - time.monotonic() <= 7
        assert submit.tenant
        assert "secret" not in submit.tenant


# --- errors ---


def error_of(answer: Any) -> dict[str, Any]:
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


@run
async def test_every_error_has_openais_shape_and_its_status() -> None:
    async with kit(body_bytes_max=2000) as k:
        cases = [
            (await k.chat(temperature=5), 400, "temperature"),
            (await k.http.post("/v1/completions", content=b"{"), 400, "body"),
            (await k.http.post("/v1/completions", content=b'"\xff"'), 400, "body"),
            (await k.chat("x" * 3000), 413, "body"),
            (await k.post("/v1/completions", {"model": "gpt", "prompt": "x"}), 404, "model"),
            (await k.http.get("/v1/models/other"), 404, "model"),
            (await k.http.get("/nothing"), 404, None),
            (await k.http.get("/v1/completions"), 405, None),
            (await k.complete(""), 400, "prompt"),
            (await k.complete("fox " * 300), 400, "prompt"),
            (await k.chat("fox " * 300), 400, "messages"),
        ]
        for answer, status, name in cases:
            assert answer.status_code == status, answer.text
            error = error_of(answer)
            assert error["param"] == name
            assert error["type"] == "invalid_request_error"
            assert error["message"]
        assert cases[7][0].headers["allow"] == "POST"
        assert not k.core.submits


@run
async def test_a_body_without_a_length_is_cut_off_at_the_limit() -> None:
    async with kit(body_bytes_max=1000) as k:

        async def drip() -> Any:
            for _ in range(100):
                yield b"x" * 100

        answer = await k.http.post("/v1/completions", content=drip())
        assert answer.status_code == 413


@run
async def test_refusals_of_the_core_keep_their_status_and_say_when_to_retry() -> None:
    async with kit() as k:
        for status, code, retry in [
            (429, "queue_full", 7.0),
            (503, None, 3.0),
            (400, "never_fits", None),
            (500, "x", None),
        ]:
            k.core.refuse = Refused((), status, "no", "max_tokens", code, retry)
            for stream in (False, True):
                answer = await k.chat(stream=stream)
                assert answer.status_code == status
                expected = "max_tokens: no" if status == 400 else "no"
                assert error_of(answer)["message"] == expected
                assert answer.headers.get("retry-after") == (str(int(retry)) if retry else None)
        assert k.client.open == 0


@run
async def test_a_deadline_is_504_before_the_first_token_and_an_sse_error_after_it() -> None:
    async with kit() as k:
        k.core.answer = lambda s, c: ([], int(End.NONE))
        for stream in (False, True):
            asked = asyncio.create_task(k.chat(stream=stream))
            await until(lambda: bool(k.core.rows))
            request_id = next(iter(k.core.rows))
            del k.core.rows[request_id]
            k.core.send(Ended(request_id, int(End.DEADLINE), "too late", 0, 0))
            answer = await asked
            assert answer.status_code == 504
            assert error_of(answer)["code"] == "deadline"
        k.core.answer = lambda s, c: (k.tokenizer.encode("Hello"), int(End.NONE))
        asked = asyncio.create_task(k.chat(stream=True))
        await until(lambda: any(r.sent == len(r.script) for r in k.core.rows.values()))
        request_id, row = next(iter(k.core.rows.items()))
        k.core.send(Ended(request_id, int(End.DEADLINE), "too late", row.sent, 0))
        events = events_of((await asked).text)
        assert events[-2]["error"]["code"] == "deadline"
        assert events[-1] == "[DONE]"
        reasons = [e["choices"][0]["finish_reason"] for e in events[:-2]]
        assert reasons == [None] * len(reasons)


@run
async def test_a_core_that_forgets_a_deadline_is_not_waited_for() -> None:
    async with kit(client_options={"accept_timeout_s": 1.0}) as k:
        k.core.answer = lambda s, c: ([], int(End.NONE))
        asked = asyncio.create_task(k.chat(timeout=0.05))
        await until(lambda: k.client.open == 1)
        for generation in k.client.session.generations.values():
            generation.deadline_s -= 5.0  # the grace
        assert (await asked).status_code == 504
        await until(lambda: bool(k.core.cancels))


@run
async def test_engine_faults_are_500_and_never_a_4xx() -> None:
    async with kit() as k:
        k.core.answer = lambda s, c: ([], int(End.NONE))
        for end, status, code in [
            (End.ENGINE_FAULT, 500, "engine_fault"),
            (End.NOT_FINITE, 500, "not_finite"),
            (End.SHUTDOWN, 503, "shutdown"),
        ]:
            asked = asyncio.create_task(k.chat())
            await until(lambda: bool(k.core.rows))
            request_id = next(iter(k.core.rows))
            del k.core.rows[request_id]
            k.core.send(Ended(request_id, int(end), "broken", 0, 0))
            answer = await asked
            assert answer.status_code == status
            assert error_of(answer)["code"] == code


@run
async def test_an_error_of_ours_is_a_500_that_says_nothing_of_it(
    caplog: pytest.LogCaptureFixture | None = None,
) -> None:
    async with kit() as k:

        def broken(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("the secret inside")

        k.client.start = broken
        answer = await k.chat(stream=True)
        assert answer.status_code == 500
        error = error_of(answer)
        assert error["code"] == "internal_error"
        assert "secret" not in answer.text
        assert answer.headers["x-request-id"] in error["message"]


# --- keys, ids, CORS, other routes ---


@run
async def test_api_keys_guard_what_computes_and_nothing_else() -> None:
    async with kit(api_keys=("one", "two")) as k:
        for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
            for heads in ({}, {"authorization": "Bearer three"}, {"authorization": "Basic one"}):
                answer = await k.http.post(path, json={}, headers=heads)
                assert answer.status_code == 401
                assert error_of(answer)["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        assert (await k.http.get("/v1/models")).status_code == 401
        heads = {"authorization": "Bearer two"}
        assert (await k.http.get("/v1/models", headers=heads)).status_code == 200
        for path in ("/health", "/ready", "/metrics", "/openapi.json", "/docs"):
            assert (await k.http.get(path)).status_code == 200


@run
async def test_a_request_id_is_returned_drawn_or_refused() -> None:
    async with kit() as k:
        kept = await k.http.get("/health", headers={"x-request-id": "abc-123"})
        assert kept.headers["x-request-id"] == "abc-123"
        drawn = [(await k.http.get("/health")).headers["x-request-id"] for _ in range(2)]
        assert len({*drawn, "abc-123"}) == 3
        for bad in ("", "a b", "x" * 129, 'a"b'):
            answer = await k.http.get("/health", headers={"x-request-id": bad})
            assert answer.status_code == 400
            assert error_of(answer)["param"] == "x-request-id"
            assert answer.headers["x-request-id"] != bad


@run
async def test_cors_headers_are_on_answers_and_errors_of_allowed_origins() -> None:
    async with kit(cors_origins=("https://ok.example",)) as k:
        heads = {"origin": "https://ok.example"}
        for path in ("/health", "/nothing"):
            answer = await k.http.get(path, headers=heads)
            assert answer.headers["access-control-allow-origin"] == "https://ok.example"
        other = await k.http.get("/health", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        asked = {**heads, "access-control-request-method": "POST"}
        asked["access-control-request-headers"] = "authorization"
        preflight = await k.http.options("/v1/chat/completions", headers=asked)
        assert preflight.status_code == 200


@run
async def test_models_tokenize_and_detokenize() -> None:
    async with kit() as k:
        listed = (await k.http.get("/v1/models")).json()
        assert listed["data"][0]["id"] == "tiny"
        assert (await k.http.get("/v1/models/tiny")).json() == listed["data"][0]
        ids = (await k.post("/tokenize", {"prompt": "Hello 👩", "return_token_strs": True})).json()
        assert ids["count"] == len(ids["tokens"]) == len(ids["token_strs"])
        back = await k.post("/detokenize", {"tokens": ids["tokens"]})
        assert back.json() == {"prompt": "Hello 👩"}
        message = {"role": "user", "content": "x"}
        chat = (await k.post("/tokenize", {"messages": [message]})).json()["tokens"]
        assert k.tokenizer.decode(chat, skip_special=False).endswith("assistant\n")
        assert (await k.post("/detokenize", {"tokens": [600]})).status_code == 400
        assert (await k.post("/tokenize", {})).status_code == 400
        assert (await k.post("/tokenize", {"prompt": "x", "messages": []})).status_code == 400


@run
async def test_ready_follows_the_core_and_health_does_not() -> None:
    async with kit() as k:
        assert (await k.http.get("/ready")).json()["ready"] is True
        k.core.send(State(False, "the worker is being replaced"))
        await until(lambda: not k.client.ready)
        answer = await k.http.get("/ready")
        assert answer.status_code == 503
        assert "replaced" in error_of(answer)["message"]
        assert answer.headers["retry-after"]
        assert (await k.http.get("/health")).status_code == 200
        k.client.drain()
        assert (await k.chat()).status_code == 503


@run
async def test_metrics_count_requests_tokens_and_times() -> None:
    async with kit() as k:
        k.says("Hello world")
        await k.chat()
        await k.chat(temperature=9)
        await k.http.get("/etc/passwd")
        text = (await k.http.get("/metrics")).text
        found = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        count = len(k.tokenizer.encode("Hello world"))
        assert found["holdfast_http_requests_total", "/v1/chat/completions", "200"] == 1
        assert found["holdfast_http_requests_total", "/v1/chat/completions", "400"] == 1
        assert found["holdfast_http_requests_total", "404", "other"] == 1
        assert found["holdfast_completion_tokens_total",] == count
        assert found["holdfast_ttft_seconds_count",] == 1
        assert found["holdfast_itl_seconds_count",] == count - 1
        assert found["holdfast_e2e_seconds_count",] == 1
        assert found["holdfast_streams_open",] == 0


@run
async def test_the_documentation_names_every_field_and_resolves() -> None:
    async with kit() as k:
        schema = (await k.http.get("/openapi.json")).json()
        schemas = schema["components"]["schemas"]
        assert "min_p" in schemas["ChatRequest"]["properties"]
        references = {
            part.split('"')[0] for part in json.dumps(schema).split("#/components/schemas/")[1:]
        }
        assert references <= set(schemas)


# --- clients that leave, stall, or wait ---


async def asgi(k: Kit, body: dict[str, Any]) -> tuple[asyncio.Task[None], asyncio.Event, list[Any]]:
    """A request at the ASGI level: (its task, set it to disconnect, what was sent)."""
    gone, sent = asyncio.Event(), []
    pending = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        if pending:
            return pending.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "scheme": "http",
    }
    return asyncio.create_task(k.app(scope, receive, send)), gone, sent


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", ["Hi", ["Hi", "Ho"]])
@run
async def test_a_client_that_disconnects_is_cancelled_at_once(stream: bool, prompt: Any) -> None:
    async with kit() as k:
        k.core.answer = lambda s, c: ([10] * 5, int(End.NONE))
        body = {"model": "tiny", "prompt": prompt, "stream": stream, "n": 2}
        task, gone, sent = await asgi(k, body)
        prompts = 2 if isinstance(prompt, list) else 1
        await until(lambda: len(k.core.rows) == 2 * prompts and bool(sent) == stream)
        gone.set()
        await until(lambda: len(k.core.cancels) == 2 * prompts)
        await task
        assert k.client.open == 0
        assert k.board.total("stream_cancelled_total", ("disconnect",)) == prompts
        assert k.board.total("http_requests_total", ("/v1/completions", "200")) == int(stream)


@run
async def test_a_client_that_leaves_before_the_core_answers_is_cancelled() -> None:
    async with kit() as k:
        k.core.accepting = False
        task, gone, sent = await asgi(k, {"model": "tiny", "prompt": "x"})
        await until(lambda: bool(k.core.submits))
        gone.set()
        await task
        await until(lambda: bool(k.core.cancels))
        assert sent == []
        assert k.board.total("http_requests_total", ("/v1/completions", "499")) == 1


@run
async def test_a_client_that_does_not_read_is_cancelled_after_the_write_timeout() -> None:
    async with kit(client_options={"write_timeout_s": 0.2}) as k:
        k.core.answer = lambda s, c: ([10] * 100, int(End.NONE))
        blocked = asyncio.Event()
        body = json.dumps({"model": "tiny", "prompt": "x", "stream": True}).encode()
        pending = [{"type": "http.request", "body": body, "more_body": False}]

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await blocked.wait()

        async def receive() -> Any:
            if pending:
                return pending.pop()
            await blocked.wait()

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "root_path": "",
            "headers": [],
            "http_version": "1.1",
            "scheme": "http",
        }
        await k.app(scope, receive, send)
        assert k.board.total("stream_cancelled_total", ("slow_reader",)) == 1
        await until(lambda: bool(k.core.cancels))


@run
async def test_the_buffer_of_a_slow_reader_is_bounded() -> None:
    async with kit(client_options={"buffer_tokens": 8}) as k:
        k.core.held = True
        k.core.answer = lambda s, c: ([10] * 20, int(End.NONE))
        resolved = _resolved(k)
        generation = await k.client.submit(b"\1\0\0\0", resolved)
        request_id = next(iter(k.core.rows))
        k.core.batch([(request_id, index, 10, 0) for index in range(20)])
        await until(lambda: bool(k.core.cancels))
        assert generation.cancelled == "slow_reader"
        assert len(await generation.next()) == 8


def _resolved(k: Kit) -> Any:
    from holdfast.api.schema import SamplingParams

    return SamplingParams().resolve(k.limits, prompt_tokens=1, end_ids=(END_ID,))


@run
async def test_a_silent_stream_gets_keep_alive_comments() -> None:
    async with kit(client_options={"keepalive_s": 0.05}) as k:
        k.core.answer = lambda s, c: (k.tokenizer.encode("fox"), int(End.NONE))
        task, gone, sent = await asgi(k, {"model": "tiny", "prompt": "x", "stream": True})
        await until(lambda: any(m.get("body") == b": keep-alive\n\n" for m in sent))
        first = next(i for i, m in enumerate(sent) if m.get("body") == b": keep-alive\n\n")
        assert sent[0]["type"] == "http.response.start"
        assert first > 1
        gone.set()
        await task
