"""Parts `faults` and `dma`: each kind of fault, with its neighbours unharmed."""

from __future__ import annotations

import time

import probe_cuda as cuda
from cuda.bindings import driver
from probe_cuda import GIB, call, now
from probe_keeper import Keeper, span, summary

FAULTS = ("address", "misaligned", "trap", "tensor_map", "assert", "store_read_only")
DMA_FAULTS = ("dma_unmapped", "dma_read_only")


def faults(keeper: Keeper, kinds=FAULTS, repeats: int = 3) -> None:
    size, gpu = GIB, keeper.gpu
    plain = int(call(driver.cuMemAlloc(size)))
    gpu.fill(plain, size, 1)
    handle, fd = cuda.vmm_create(size)
    shared = cuda.vmm_map(handle, size)
    gpu.fill(shared, size, 2)
    sums = gpu.checksum(plain, size), gpu.checksum(shared, size)
    exported = cuda.ipc_export(plain)
    standby = keeper.child("standby")

    def map_both(child, read_only=False):
        child.ask("map_ipc", name="ipc", size=size, handle=exported)
        child.ask("map_vmm", [fd], name="vmm", size=size, read_only=read_only)

    def sums_of(child):
        return tuple(
            child.ask("checksum", name=name, offset=0, size=size)["sum"] for name in ("ipc", "vmm")
        )

    def run(kind, then):
        with keeper.child() as worker:
            map_both(worker, read_only=True)
            if sums_of(worker) != sums:
                raise RuntimeError("the worker read other bytes than the keeper wrote")
            sent = now()
            worker.send("fault", kind=kind, name="vmm", then=then)
            word, arrived = None, None
            if then == "stay":
                word = worker.receive(10)
                arrived = now()
                if "refused" in word:
                    return {"refused": word["refused"]}
            elif then == "killed early":
                time.sleep(0.02)  # before the driver has told the worker anything
            killed = sent if then == "exit" else worker.kill()
            times = worker.watch(killed, 20)
            fenced = worker.fenced_ns
        # A third process, whose context lived through the fault, maps the memory and uses it.
        map_both(standby)
        verified = sums_of(standby) == sums
        usable = (now() - fenced) / 1e6
        standby.ask("store", name="vmm", offset=0, value=1)
        standby.ask("fill", name="vmm", offset=0, size=size, seed=2)
        for name in ("ipc", "vmm"):
            standby.ask("unmap", name=name)
        intact = (gpu.checksum(plain, size), gpu.checksum(shared, size)) == sums
        launched = sent if word is None else word["launched_ns"]
        return {
            "status": None if word is None else word["status"],
            "error_ms": None if word is None else (word["error_ns"] - launched) / 1e6,
            "word_ms": None if word is None else (arrived - launched) / 1e6,
            "fenced_ms": (fenced - launched) / 1e6,
            "verified": verified,
            "intact": intact,
            "usable_ms": usable,
            **times,
        }

    def series(kind, then, count):
        runs = [run(kind, then) for _ in range(count)]
        what = (
            kind
            + {
                "stay": "",
                "exit": ", worker exits at its word",
                "killed early": ", killed 20 ms after the fault",
            }[then]
        )
        if refused := [r["refused"] for r in runs if "refused" in r]:
            keeper.record(
                what, f"refused by the driver before it was queued: {refused[0]}", runs=runs
            )
            return
        held = all(r["verified"] and r["intact"] for r in runs)
        faulted = then != "stay" or all(r["status"] != "CUDA_SUCCESS" for r in runs)
        keeper.record(
            what,
            f"{(runs[0]['status'] or '').removeprefix('CUDA_ERROR_')} fault->word "
            f"{span([r['word_ms'] for r in runs])}, kill->eof {span([r['eof'] for r in runs])}, "
            f"->pidfd {span([r['pidfd'] for r in runs])}, fault->pidfd "
            f"{span([r['fenced_ms'] for r in runs])}, third verified 2 GiB "
            f"{span([r['usable_ms'] for r in runs])} ms after",
            held and faulted,
            runs=runs,
            word_ms=summary(r["word_ms"] for r in runs if r["word_ms"] is not None),
            pidfd_ms=summary(r["pidfd"] for r in runs),
        )

    with standby:
        for kind in kinds:
            keeper.attempt(kind, series, kind, "stay", repeats)
        if "address" in kinds:
            keeper.attempt("address, exits", series, "address", "exit", 2)
            for kind in ("address", "trap"):
                keeper.attempt(f"{kind}, killed early", series, kind, "killed early", 3)
        with keeper.child("late") as late:  # and a context made after all of it
            map_both(late)
            keeper.record("a context made after all faults", "same sums", sums_of(late) == sums)


def dma(keeper: Keeper) -> None:
    faults(keeper, DMA_FAULTS)
