"""The methods of offline, decode and prefill, on times that a test made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.bench import floors, timed
from holdfast.bench.decode import Decode
from holdfast.bench.offline import Offline
from holdfast.bench.prefill import Prefill
from holdfast.bench.timed import PeerSide, Spent
from holdfast.bench.workload import even_work, mixed_work, peers_work
from holdfast.errors import OptionError
from holdfast.model.spec import ModelSpec

VOCAB = 1000
H200 = floors.MACHINES["NVIDIA H200"]
QWEN = (
    '{{"architectures":["Qwen3ForCausalLM"],"model_type":"qwen3","head_dim":128,'
    '"hidden_size":{hidden},"intermediate_size":{inner},"max_position_embeddings":40960,'
    '"num_attention_heads":{heads},"num_hidden_layers":{layers},"num_key_value_heads":8,'
    '"rms_norm_eps":1e-06,"rope_theta":1000000,"tie_word_embeddings":{tied},'
    '"torch_dtype":"bfloat16","vocab_size":151936}}'
)
SHAPES = {
    "0.6b": {"hidden": 1024, "inner": 3072, "heads": 16, "layers": 28, "tied": "true"},
    "8b": {"hidden": 4096, "inner": 12288, "heads": 32, "layers": 36, "tied": "false"},
}


def spec(tmp_path: Path, name: str) -> ModelSpec:
    (tmp_path / "config.json").write_text(QWEN.format(**SHAPES[name]))
    return ModelSpec.load(tmp_path)


def test_a_decode_step_is_the_difference_of_a_long_and_a_short_answer() -> None:
    bench = Decode(VOCAB, (1, 8), context=5, steps=100, repeats=2)
    spent = {task.key: Spent(0.25, 0.0) for task in bench.tasks()}
    longs = [key for key in spent if key.endswith("long")]
    assert len(longs) == 4
    for number, key in enumerate(longs):
        spent[key] = Spent(0.25 + 0.1 * (number + 1), 0.0)
    values = bench.values(spent)
    assert [value.batch for value in values] == [1, 8]
    assert values[0].runs == pytest.approx((1.0, 2.0))
    assert values[1].runs == pytest.approx((3.0, 4.0))


def test_the_three_tasks_of_a_decode_run_share_prompts_and_runs_do_not() -> None:
    bench = Decode(VOCAB, (2,), context=5, steps=10, repeats=2)
    prompts = [task.work.prompts for task in bench.tasks()]
    assert prompts[0] == prompts[1] == prompts[2] != prompts[3]
    assert len({task.tenant for task in bench.tasks()[:3]}) == 1
    assert [task.work.output_tokens for task in bench.tasks()[:3]] == [(4, 4), (8, 8), (18, 18)]


def test_prefill_counts_prompt_tokens_and_no_run_shares_a_prompt() -> None:
    bench = Prefill(VOCAB, 4, 100, repeats=3)
    tasks = bench.tasks()
    assert len({prompt for task in tasks for prompt in task.work.prompts}) == 12
    spent = {task.key: Spent(0.5, 0.0) for task in tasks}
    assert bench.values(spent)[0].runs == (800.0, 800.0, 800.0)


def test_offline_counts_the_tokens_that_were_asked_for() -> None:
    work = mixed_work(VOCAB, requests=5)
    bench = Offline(VOCAB, work, repeats=2)
    assert bench.tasks()[0].work.prompts != bench.tasks()[1].work.prompts
    assert bench.tasks()[0].work.output_tokens == bench.tasks()[1].work.output_tokens
    spent = {task.key: Spent(2.0, 0.0) for task in bench.tasks()}
    (value,) = bench.values(spent)
    assert value.runs == (sum(work.output_tokens) / 2,) * 2


def test_a_peer_with_fewer_runs_and_no_cpu_time_is_set_beside_ours() -> None:
    bench = Offline(VOCAB, mixed_work(VOCAB, requests=3), repeats=3)
    keys = [task.key for task in bench.tasks()]
    side = PeerSide("vllm", "1", {keys[0]: Spent(1.0, 0.0)}, {})
    ours = {key: Spent(2.0, 1.0) for key in keys}
    found = timed.figures([bench], ours, side, model="m", options={}, floor=lambda value: None)
    assert [figure.metric for figure in found] == ["output rate", "output rate of a CPU"]
    assert found[0].ratio == 0.5
    assert found[1].peer is None


@pytest.mark.parametrize(
    ("bench", "option"),
    [
        (Offline(VOCAB, peers_work(VOCAB, requests=4)), "--work"),
        (Decode(VOCAB, (1,), context=250, steps=100), "--context"),
        (Prefill(VOCAB, 2, 256), "--tokens"),
        (Decode(VOCAB, (1, 65), context=5, steps=5), "--batch"),
    ],
    ids=["offline", "decode", "prefill", "batch"],
)
def test_work_that_does_not_fit_names_the_option_to_change(bench: timed.Bench, option: str) -> None:
    with pytest.raises(OptionError) as caught:
        timed.check_fits([bench], 256, 64)
    assert caught.value.option == option
    assert "\n" not in str(caught.value)


def test_even_work_differs_between_seeds_and_stays_in_the_vocabulary() -> None:
    sizes = {"requests": 3, "prompt_tokens": 7, "output_tokens": 2}
    first, second = (even_work("w", 50, **sizes, seed=seed) for seed in (0, 1))
    assert first.prompts != second.prompts
    assert first == even_work("w", 50, **sizes, seed=0)
    assert {len(prompt) for prompt in first.prompts} == {7}
    assert max(map(max, first.prompts)) < 50


@pytest.mark.parametrize(
    ("name", "step_ms", "offline"), [("0.6b", 0.30, 39_000), ("8b", 3.59, 13_200)]
)
def test_floors_are_those_that_were_computed_by_hand(
    tmp_path: Path, name: str, step_ms: float, offline: float
) -> None:
    model = spec(tmp_path, name)
    assert floors.decode_ms(model, "bfloat16", H200, 1, 640) == pytest.approx(step_ms, rel=0.03)
    work = peers_work(model.vocab_size)
    assert floors.offline_rate(model, "bfloat16", H200, work) == pytest.approx(offline, rel=0.1)


def test_a_machine_that_nobody_measured_has_no_floor(tmp_path: Path) -> None:
    model = spec(tmp_path, "0.6b")
    bench = Decode(VOCAB, (1,), context=5, steps=5, repeats=1)
    (value,) = bench.values({task.key: Spent(1.0, 0) for task in bench.tasks()})
    assert floors.of(model, "bfloat16", "NVIDIA H200", (bench,))(value) is not None
    for gpu in (None, "NVIDIA A100"):
        assert floors.of(model, "bfloat16", gpu, (bench,))(value) is None
