"""Metrics: slots add up, survive their writers, and read as Prometheus text."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from holdfast.core.metrics import METRICS, Metrics, MetricsBoard
from holdfast.errors import InvariantError


def board_of(slots: int) -> tuple[list[Metrics], MetricsBoard, bytearray]:
    buffer = bytearray(Metrics.size(slots))
    return [Metrics(buffer, i) for i in range(slots)], MetricsBoard(buffer, slots), buffer


def samples(board: MetricsBoard) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = board.render().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_counters_and_gauges_sum_over_the_slots() -> None:
    (core, _, left, right), board, _ = board_of(4)
    core.add("tokens_generated_total", 5)
    left.set("streams_open", 2)
    right.set("streams_open", 3)
    right.add("http_requests_total", labels=("/health", "200"))
    left.add("http_requests_total", 2, labels=("/health", "200"))
    found = samples(board)
    assert found["holdfast_tokens_generated_total", ()] == 5
    assert found["holdfast_streams_open", ()] == 5
    assert found["holdfast_http_requests_total", (("code", "200"), ("route", "/health"))] == 3


def test_a_label_value_outside_the_list_counts_as_other() -> None:
    (one,), board, _ = board_of(1)
    one.add("http_requests_total", labels=("/secret/../../x", "418"))
    one.add("http_requests_total", labels=("/health", "418"))
    found = samples(board)
    assert found["holdfast_http_requests_total", (("code", "other"), ("route", "other"))] == 1
    assert found["holdfast_http_requests_total", (("code", "other"), ("route", "/health"))] == 1


def test_the_number_of_labels_is_checked() -> None:
    with pytest.raises(InvariantError, match="has labels"):
        Metrics.private().add("requests_ended_total", labels=("stop", "twice"))


def test_histogram_buckets_cumulate_and_the_bound_itself_belongs_below() -> None:
    (one, two), board, _ = board_of(2)
    for value in (0.001, 0.0011, 0.3):
        one.observe("ttft_seconds", value)
    two.observe("ttft_seconds", 1e9)
    found = samples(board)
    assert found["holdfast_ttft_seconds_bucket", (("le", "0.001"),)] == 1
    assert found["holdfast_ttft_seconds_bucket", (("le", "0.0025"),)] == 2
    assert found["holdfast_ttft_seconds_bucket", (("le", "250"),)] == 3
    assert found["holdfast_ttft_seconds_bucket", (("le", "+Inf"),)] == 4
    assert found["holdfast_ttft_seconds_count", ()] == 4
    assert found["holdfast_ttft_seconds_sum", ()] == pytest.approx(1e9 + 0.3021)


def test_numbers_survive_the_process_that_wrote_them_and_its_successor_continues() -> None:
    fd = os.memfd_create("metrics")
    os.ftruncate(fd, Metrics.size(2))
    code = (
        "import mmap, sys; from holdfast.core.metrics import Metrics\n"
        f"m = Metrics(memoryview(mmap.mmap({fd}, 0)), 1)\n"
        "m.add('steps_total', 7); import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], pass_fds=[fd], timeout=30)
        assert done.returncode == -9
    with mmap.mmap(fd, 0) as shared:
        view = memoryview(shared)
        board = MetricsBoard(view, 2)
        assert board.total("steps_total") == 14
        del board
        view.release()
    os.close(fd)


def test_slots_of_one_table_do_not_overlap() -> None:
    writers, board, _ = board_of(3)
    for metric in METRICS:
        if metric.kind == "histogram":
            writers[1].observe(metric.name, 0.5)
            continue
        for values in metric.combinations:
            writers[1].add(metric.name, labels=values)
    for metric in METRICS:
        if metric.kind != "histogram":
            for values in metric.combinations:
                assert board.total(metric.name, values) == 1
                assert writers[0].get(metric.name, values) == 0
                assert writers[2].get(metric.name, values) == 0


def test_a_slot_written_with_another_table_is_refused() -> None:
    _, _, buffer = board_of(1)
    memoryview(buffer).cast("d")[0] = 1.5
    with pytest.raises(InvariantError, match="another table"):
        Metrics(buffer, 0)


def test_a_buffer_without_the_slot_is_refused() -> None:
    with pytest.raises(InvariantError, match="lacks slot 1"):
        Metrics(bytearray(Metrics.size(1)), 1)


def test_the_module_needs_neither_numpy_nor_prometheus_to_write() -> None:
    code = (
        "import sys; from holdfast.core.metrics import Metrics\n"
        "Metrics.private().add('steps_total')\n"
        "assert not {'numpy', 'prometheus_client', 'torch'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
