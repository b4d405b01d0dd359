"""cuda_driver, proc.cuda_memory and cuda_probe over a fake driver."""

from __future__ import annotations

import os

import pytest
from fake_cuda import GRANULE, NOT_SUPPORTED, Library

from holdfast.cuda_driver import CudaError, Driver, parse_device
from holdfast.errors import OptionError, WorkerFault
from holdfast.proc import cuda_memory, cuda_probe, keeper
from holdfast.proc.cuda_memory import Mapping, make_slabs, shares, slab_bytes

MIB = 1 << 20
SLABS = [("weights", 3 * MIB, "MODEL"), ("kv-pool", 5 * MIB, "--kv-pages")]


@pytest.fixture
def library() -> Library:
    return Library()


@pytest.fixture
def driver(library: Library) -> Driver:
    return Driver(library)


def fds_open() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_slabs_are_zero_rounded_up_and_outlive_the_context_that_made_them(library, driver):
    fds = make_slabs(driver, 0, SLABS)
    assert [len(memory) for memory in library.memory.values()] == [4 * MIB, 6 * MIB]
    assert not any(any(memory) for memory in library.memory.values())
    assert (library.contexts, library.current) == (0, False)
    assert not library.handles and not library.mapped and not library.reserved
    for fd in fds:
        os.close(fd)


def test_what_one_mapping_writes_the_other_reads_and_cannot_write(library, driver):
    fds = make_slabs(driver, 0, SLABS)
    driver.enter(0)
    first = Mapping(driver, fds[0], 3 * MIB, 0, write=True)
    second = Mapping(driver, fds[0], 3 * MIB, 0, write=False)
    driver.copy_in(first.address, b"loaded")
    assert driver.copy_out(second.address, 6) == b"loaded"
    assert library.mapped[second.address][1] == 1
    # Once loaded, the loader gives its own right to write away, at the same address.
    before = first.address
    first.protect()
    assert first.address == before and library.mapped[before][1] == 1
    first.close()
    second.close()
    assert not library.mapped and not library.reserved and not library.handles
    for fd in fds:
        os.close(fd)


def test_no_room_names_the_option_with_the_numbers_and_leaves_nothing_behind(library, driver):
    before = fds_open()
    with pytest.raises(OptionError, match=r"--kv-pages: kv-pool needs 2\.0 GiB of GPU memory and"):
        make_slabs(driver, 0, [SLABS[0], ("kv-pool", 2 << 30, "--kv-pages")])
    assert fds_open() == before
    assert not library.handles and library.contexts == 0


def test_memory_that_cannot_be_shared_is_the_keepers_word_and_not_its_end(monkeypatch):
    library = Library(fail={"cuMemExportToShareableHandle": NOT_SUPPORTED})
    monkeypatch.setattr(keeper, "Driver", lambda: Driver(library))
    fds, why = keeper.make_slabs("cuda:0", weights_bytes=MIB, pool_bytes=MIB)
    assert fds == []
    assert why == "cuMemExportToShareableHandle: CUDA_ERROR_NOT_SUPPORTED (801)"
    assert not library.handles and library.contexts == 0


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        ("cuMemCreate", "cuMemCreate: CUDA_ERROR_NOT_SUPPORTED"),
        ("cuMemImportFromShareableHandle", "cuMemImportFromShareableHandle"),
        ("cuMemSetAccess", "cuMemSetAccess"),
        (None, ""),
    ],
)
def test_sharing_is_tried_and_the_reason_named(library, driver, call, shown):
    driver.enter(0)
    if call is not None:
        library.fail[call] = NOT_SUPPORTED
    before = fds_open()
    found = shares(driver, 0)
    assert found.startswith(shown) and bool(found) == bool(shown)
    assert fds_open() == before
    assert not library.handles and not library.mapped and not library.reserved


def test_a_mapping_that_shows_other_bytes_is_not_shared_memory(library, driver, monkeypatch):
    driver.enter(0)
    monkeypatch.setattr(driver, "copy_out", lambda address, size: bytes(size))
    assert "other bytes" in shares(driver, 0)


def test_the_probe_says_what_is_free_and_holds_nothing(library, driver):
    gpu = cuda_probe.ask(0, driver)
    assert (gpu.name, gpu.total_bytes, gpu.free_bytes, gpu.unshared) == (
        "Fake GPU",
        1 << 30,
        1 << 30,
        "",
    )
    assert library.contexts == 0 and not library.mapped


@pytest.mark.parametrize(("devices", "there"), [(0, "none is there"), (2, "cuda:0 to cuda:1")])
def test_a_gpu_that_is_not_there_is_named_with_those_that_are(devices, there):
    with pytest.raises(OptionError, match=f"no cuda:3; {there}"):
        cuda_probe.ask(3, Driver(Library(devices=devices)))


def test_a_driver_that_does_not_start_is_the_operators_to_mend():
    with pytest.raises(OptionError, match="--device: the CUDA driver does not start"):
        Driver(Library(fail={"cuInit": 100}))


def test_a_failed_call_names_itself_and_is_a_worker_fault(library, driver):
    library.fail["cuMemMap"] = NOT_SUPPORTED
    driver.enter(0)
    fds = []
    with pytest.raises(CudaError, match="cuMemMap: CUDA_ERROR_NOT_SUPPORTED") as caught:
        fds = make_slabs(driver, 0, SLABS)
    assert isinstance(caught.value, WorkerFault) and not fds


def test_sizes_are_whole_granules():
    assert [slab_bytes(size) for size in (0, 1, GRANULE, GRANULE + 1)] == [
        GRANULE,
        GRANULE,
        GRANULE,
        2 * GRANULE,
    ]
    assert cuda_memory.GRANULE_BYTES == GRANULE


@pytest.mark.parametrize(
    ("text", "parsed"), [("cpu", ("cpu", 0)), ("cuda", ("cuda", 0)), ("cuda:12", ("cuda", 12))]
)
def test_devices_are_read_as_torch_reads_them(text, parsed):
    assert parse_device(text) == parsed


@pytest.mark.parametrize("text", ["", "gpu", "cpu:0", "cuda:", "cuda:-1", "cuda:x", "cuda:²"])
def test_a_word_that_is_no_device_is_refused(text):
    with pytest.raises(OptionError, match="--device"):
        parse_device(text)
