"""The peer's protocol, with a fake vllm that behaves and misbehaves, in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import pytest

from holdfast.bench.decode import Decode
from holdfast.bench.peers import vllm_peer
from holdfast.bench.peers.vllm_peer import Vllm
from holdfast.bench.timed import all_tasks
from holdfast.errors import OperatorError, OptionError

FAKES = Path(__file__).parent / "fakes"
BENCH = Decode(100, (1, 2), context=4, steps=20, repeats=2)


@pytest.fixture
def peer(tmp_path: Path) -> Vllm:
    (tmp_path / "config.json").write_text("{}")
    return Vllm(
        model=tmp_path,
        load="dummy",
        dtype="bfloat16",
        context_tokens=64,
        path=(FAKES,),
        timeout_s=30.0,
    )


def quiet(what: str, done: int, total: int) -> None:
    pass


def test_a_peer_runs_our_tasks_and_says_how_long_each_took(peer: Vllm) -> None:
    side = peer.found().side()
    peer.measure(all_tasks([BENCH]), quiet, side)
    assert (side.name, side.version) == ("vllm", "0.0.fake")
    assert side.options["max_model_len"] == 64 and side.options["load_format"] == "dummy"
    for value in BENCH.values(side.spent):
        # The fake sleeps 5 ms a step. A busy machine sleeps longer, in the short run too, which is
        # subtracted: over 20 steps that must not be half of it.
        assert len(value.runs) == 2 and min(value.runs) > 2.5


def test_a_python_without_vllm_is_named_in_one_line(peer: Vllm, tmp_path: Path) -> None:
    without = dataclasses.replace(peer, path=(tmp_path,))
    with pytest.raises(OptionError, match="vllm cannot be imported") as caught:
        without.found()
    assert caught.value.option == "--peer-python"
    assert sys.executable in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(OptionError, match=r"--peer-python: cannot run /no/python"):
        dataclasses.replace(peer, python="/no/python").found()


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("no-memory", "ended with code 1.*no available memory"),
        ("die", "ended with code 134.*illegal memory access"),
        ("short", "not as many as were asked"),
    ],
)
def test_a_peer_that_fails_is_told_in_its_own_words(
    peer: Vllm, mode: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", mode)
    with pytest.raises(OperatorError, match=words) as caught:
        peer.measure(all_tasks([BENCH]), quiet, peer.side())
    assert "\n" not in str(caught.value)


def test_a_peer_that_hangs_is_ended_at_its_deadline(
    peer: Vllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "hang")
    started_s = time.monotonic()
    with pytest.raises(OperatorError, match="not done within 2 s; see --peer-timeout-s"):
        dataclasses.replace(peer, timeout_s=2.0).measure(all_tasks([BENCH]), quiet, peer.side())
    assert time.monotonic() - started_s < 30


def test_what_is_no_event_is_not_taken_for_one(
    peer: Vllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"
    monkeypatch.setattr(vllm_peer.run_vllm, "__file__", str(script))
    script.write_text("print('INFO loading')\n")
    with pytest.raises(OperatorError, match="which is no event"):
        peer.measure(all_tasks([BENCH]), quiet, peer.side())
    script.write_text('print(\'{"event": "version", "version": "1"}\\n{"event": "end"}\')\n')
    with pytest.raises(OperatorError, match="left out 'warm-up'"):
        peer.measure(all_tasks([BENCH]), quiet, peer.side())


def test_a_folder_without_tokenizer_gets_one_whose_words_are_ids(
    peer: Vllm, tmp_path: Path
) -> None:
    import tokenizers

    made = tmp_path / "made"
    made.mkdir()
    folder = peer.served_folder(made, 40, (7,))
    assert json.loads((folder / "config.json").read_text()) == {}
    loaded = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert loaded.encode("t3 t39").ids == [3, 39]
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "t7"
