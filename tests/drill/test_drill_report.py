"""What counts as passed, what the command shows, and what a drill's client makes of an answer."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from holdfast.drill.client import Stream
from holdfast.drill.job import Job
from holdfast.drill.registry import DRILLS, chosen
from holdfast.drill.report import CAUGHT, Failure, Report, document, line, table
from holdfast.drill.runner import Plan, passed
from holdfast.errors import OptionError

TOKENS = Failure("tokens", "3 of 48 tokens wrong, the first at 2")


def report(*failures: Failure, sabotage: bool = False, planted: bool = False) -> Report:
    made = Report("worker-kill", "", sabotage, planted=planted, sabotage_kind="tokens")
    made.failures = list(failures)
    return made


def test_a_clean_drill_passes_without_a_failure_alone() -> None:
    assert report().passed and report().verdict == "pass"
    assert not report(TOKENS).passed and report(TOKENS).verdict == "FAIL"


@pytest.mark.parametrize(
    ("made", "verdict"),
    [
        (report(TOKENS, sabotage=True, planted=True), "caught"),
        (report(sabotage=True, planted=True), "NOT CAUGHT"),
        # It failed, but by something else, or although nothing was planted: that proves nothing.
        (report(Failure("clock", "late"), sabotage=True, planted=True), "NOT CAUGHT"),
        (report(TOKENS, sabotage=True), "NOT CAUGHT"),
    ],
)
def test_under_sabotage_it_must_fail_by_what_was_planted(made: Report, verdict: str) -> None:
    assert made.verdict == verdict
    assert passed([made]) == (verdict == "caught")


def test_no_report_at_all_is_no_success() -> None:
    assert not passed([])


def test_the_table_and_the_json_show_what_is_known_and_a_dash_for_the_rest() -> None:
    made = report()
    made.streams, made.tokens, made.tokens_equal, made.resumed_s = 32, 1536, 1536, 0.25
    console = Console(width=170, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table([made]))
    row = next(text for text in console.export_text().splitlines() if "worker-kill" in text)
    for shown in ("pass", "0 of 32", "1536 of 1536", "250 ms", " - "):
        assert shown in row
    assert "resumed in 0.25 s" in line(made)
    facts = json.loads(json.dumps(document([made], device="cpu", model="m")))
    assert facts["passed"] and facts["drills"][0]["resumed_s"] == 0.25
    assert facts["drills"][0]["pages_verified"] is None
    console.file.close()


def test_every_drill_is_named_once_and_says_how_it_is_met() -> None:
    names = [drill.name for drill in DRILLS]
    assert len(set(names)) == len(names)
    issue = "worker-kill gpu-fault hang zombie-writer double-fault poison-request core-kill"
    issue += " api-kill keeper-kill api-overload hostile-input corrupt-page corrupt-weights"
    issue += " nan-row abort-storm tenant-isolation"
    issue += " window-crossing graph-width padding-canary baked-pointer stale-plan"
    assert set(names) == set(issue.split())
    assert all(drill.caught in CAUGHT and drill.what and drill.sabotage for drill in DRILLS)


def test_a_name_or_kind_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(OptionError, match="no drill is called 'tea'; there are all, worker-kill"):
        chosen("tea")
    with pytest.raises(OptionError, match="no drill chosen has a case for kind 'tea'"):
        Plan(drills=DRILLS, kind="tea").cases()
    kinds = [case for _, case in Plan(drills=chosen("gpu-fault"), kind="capture").cases()]
    assert len(kinds) == 5 and all(case.endswith("/capture") for case in kinds)


def test_the_command_lists_every_drill_and_refuses_what_it_cannot_do() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "holdfast", "drill", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    listed = run("list")
    assert listed.returncode == 0
    assert all(drill.name in listed.stdout for drill in DRILLS)
    for arguments in (("run", "tea"), ("run", "all", "--device", "auto"), ("run",)):
        refused = run(*arguments)
        assert refused.returncode == 2 and refused.stderr.count("\n") <= 3, refused.stderr


def answered(data: bytes) -> Stream:
    """What the client makes of these bytes, after which the connection ends."""

    async def serve() -> Stream:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(data)
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        async with server:
            stream = Stream(Job((1, 2), max_tokens=2))
            stream.start(server.sockets[0].getsockname()[:2], "m")
            await stream.finish()
        return stream

    return asyncio.run(serve())


def chunked(*events: dict) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    bodies = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]
    return head + b"".join(b"%x\r\n%b\r\n" % (len(body), body) for body in bodies)


def token(number: int, finish: str | None = None) -> dict:
    names = {"tokens": [f"token_id:{number}"]}
    return {"choices": [{"text": "x", "logprobs": names, "finish_reason": finish}]}


END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def test_a_whole_answer_is_whole_and_every_other_end_is_named() -> None:
    whole = answered(chunked(token(5), token(6, "length")) + END)
    assert whole.whole and whole.tokens == [5, 6] and len(whole.times) == 2
    short = answered(chunked(token(5), {"choices": [{"finish_reason": "length"}]}) + END)
    assert not short.whole and short.ended == "length"
    broken = answered(chunked(token(5)))
    assert not broken.whole and broken.ended == "reset" and broken.tokens == [5]
    failed = answered(chunked(token(5), {"error": {"code": "engine_fault"}}) + END)
    assert failed.ended == "engine_fault" and not failed.whole
    no_end = answered(chunked(token(5)) + END)
    assert no_end.ended == "cut off"


def test_a_refusal_keeps_its_status_and_its_headers() -> None:
    body = b'{"error": {"code": "queue_full"}}'
    head = b"HTTP/1.1 429 Too Many\r\nRetry-After: 3\r\nContent-Length: %d\r\n\r\n" % len(body)
    refused = answered(head + body)
    assert (refused.status, refused.ended) == (429, "status 429")
    assert refused.error["code"] == "queue_full" and refused.headers["retry-after"] == "3"
