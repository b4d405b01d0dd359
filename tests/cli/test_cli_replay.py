"""`holdfast replay` over a real journal: the same tokens again, and a difference named."""

from __future__ import annotations

import json
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from holdfast.__main__ import run
from holdfast.core.journal import JournalTail
from holdfast.llm import LLM
from holdfast.proc.journal_files import read_runs
from holdfast.wire.messages import End, Submit

ENGINE = ["--kv-pages", "200", "--max-rows", "4", "--threads", "1", "--max-context-tokens", "256"]
ENDED, CUT, LIVE = range(3)


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A copy of the journal of an engine that had a request of each kind; and their ids."""
    folder = tmp_path_factory.mktemp("journal")
    with LLM(threads=1, pages=200, rows_max=4, context_tokens=256) as llm:
        engine, prompts = llm.engine, ["A list is", "What is a tuple?", "The weather today"]
        submits = []
        for number, prompt in enumerate(prompts):
            ids = llm.tokenizer.encode(prompt, field="prompt")
            submits.append(_submit(engine.new_ids(1), ids, seed=number, tokens=12 + 40 * number))
        sinks = [_Counting(stop_at=5 if number == CUT else None) for number in range(3)]
        for submit, sink in zip(submits, sinks, strict=True):
            engine.submit(submit, (sink,))
        while sinks[ENDED].tokens < 12 or sinks[CUT].tokens < 5 or sinks[LIVE].tokens < 8:
            engine.advance(1.0)
        data = JournalTail(memoryview(engine._journal)).read()
    path = folder / "journal-20260101T000000000000000-77-000000.hfj"
    path.write_bytes(data)
    return folder, [submit.ids[0] for submit in submits]


class _Counting:
    def __init__(self, stop_at: int | None) -> None:
        self.tokens, self.stop_at = 0, stop_at

    def push(self, drawn: Any) -> int | None:
        self.tokens += 1
        return self.tokens if self.tokens == self.stop_at else None

    def finish(self, end: End, message: str) -> None: ...
    def refuse(self, refusal: Any) -> None: ...


def _submit(ids: tuple[int, ...], prompt: list[int], *, seed: int, tokens: int) -> Submit:
    from holdfast.wire.messages import Sampling

    return Submit(
        ids=ids,
        prompt=struct.pack(f"<{len(prompt)}i", *prompt),
        seeds=(seed,),
        max_tokens=tokens,
        sampling=Sampling(temperature=0.9),
        deadline_s=time.monotonic() + 600,
    )


def replayed(
    capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, list[dict[str, Any]]]:
    code = run(["replay", *map(str, arguments), "--json", *ENGINE])
    return code, json.loads(capsys.readouterr().out)["requests"]


def test_what_was_live_runs_to_its_end_and_says_the_same(
    journal: tuple[Path, list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, ids = journal
    code, requests = replayed(capsys, folder)
    assert code == 0
    (live,) = requests
    assert int(live["id"], 16) == ids[LIVE] and live["was"] == "live"
    assert live["same"] and live["compared"] == live["journal_tokens"] >= 8
    assert live["rerun_tokens"] == 92 or live["rerun_end"] == "stop"


def test_ended_requests_run_as_far_as_their_journal_goes(
    journal: tuple[Path, list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, ids = journal
    code, requests = replayed(capsys, folder, "--ended", "--text")
    assert code == 0 and [int(one["id"], 16) for one in requests] == ids
    assert [one["was"] for one in requests] == ["length", "stop", "live"]
    assert [one["rerun_tokens"] for one in requests[:2]] == [12, 5]
    assert all(one["same"] for one in requests)
    assert requests[ENDED]["prompt"] == "A list is"
    assert requests[ENDED]["rerun_text"] == requests[ENDED]["journal_text"] != ""


def test_one_request_is_replayed_by_its_id(
    journal: tuple[Path, list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, ids = journal
    code, (only,) = replayed(capsys, folder, "--request", f"{ids[CUT]:#x}")
    assert code == 0 and int(only["id"], 16) == ids[CUT] and only["compared"] == 5


def test_the_first_token_that_differs_is_named_and_the_exit_code_says_so(
    journal: tuple[Path, list[int]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, ids = journal
    (path,) = folder.iterdir()
    (tmp_path / path.name).write_bytes(with_token(path.read_bytes(), ids[ENDED], 7, 17))
    (run_read,) = read_runs(tmp_path)
    assert run_read.requests[ids[ENDED]].tokens[7] == 17
    code, (only,) = replayed(capsys, tmp_path, "--request", ids[ENDED])
    assert code == 1 and not only["same"]
    assert only["differs_at"] == 7 and only["journal_token"] == 17 != only["rerun_token"]
    assert run(["replay", str(tmp_path), "--request", str(ids[ENDED]), *ENGINE]) == 1
    assert "differs at 7: journal 17, re-run" in capsys.readouterr().out


def with_token(data: bytes, request: int, index: int, token: int) -> bytes:
    """`data` with one token of one request changed, checksums right: a lie, not damage."""
    from holdfast.core.journal import RecordKind, records_of

    seen, changed, at = 0, bytearray(data), 0
    for kind, payload in records_of(memoryview(data)):
        if kind is RecordKind.TOKENS:
            count = struct.unpack_from("<QI4x", payload)[1]
            for entry in range(count):
                if struct.unpack_from("<Q", payload, 16 + 8 * entry)[0] != request:
                    continue
                if seen == index:
                    struct.pack_into("<i", changed, at + 16 + 16 + 8 * count + 4 * entry, token)
                    body = bytes(changed[at + 16 : at + 16 + len(payload)])
                    life = struct.unpack_from("<I", data, at + 12)[0]
                    struct.pack_into("<I", changed, at + 4, zlib.crc32(body, int(kind) ^ life))
                seen += 1
        at += (16 + len(payload) + 7) & ~7
    return bytes(changed)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--request", "elephant"], "--request"),
        (["--request", "0x7"], "not in this journal"),
        (["--device", "cuda"], "--device"),
    ],
)
def test_what_cannot_be_replayed_is_one_line_and_code_2(
    journal: tuple[Path, list[int]],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    assert run(["replay", str(journal[0]), *ENGINE, *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_damaged_journal_is_named_with_its_byte(
    journal: tuple[Path, list[int]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (path,) = journal[0].iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / path.name).write_bytes(data)
    assert run(["replay", str(tmp_path), *ENGINE]) == 2
    error = capsys.readouterr().err
    assert path.name in error and "byte" in error


def test_a_journal_of_another_model_is_refused(
    journal: tuple[Path, list[int]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, ids = journal
    (path,) = folder.iterdir()
    (tmp_path / path.name).write_bytes(with_token(path.read_bytes(), ids[ENDED], 0, 151_000))
    assert run(["replay", str(tmp_path), "--ended", *ENGINE]) == 2
    assert "--model" in capsys.readouterr().err


def test_a_journal_with_nothing_live_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "journal-20260101T000000000000000-7-000000.hfj").write_bytes(b"")
    assert run(["replay", str(tmp_path), *ENGINE]) == 0
    assert "nothing was live" in capsys.readouterr().out
