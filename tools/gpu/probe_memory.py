"""Parts `vmm` and `hostmem`: kinds of memory across processes, and what they cost at death."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import probe_cuda as cuda
from cuda.bindings import driver
from probe_cuda import GIB, MIB, call, ms_since, now
from probe_keeper import Keeper, span, summary


def vmm(keeper: Keeper) -> None:
    gpu = keeper.gpu

    def attributes():
        names = (
            "VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED",
            "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED",
            "HOST_NUMA_ID",
            "HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED",
            "HOST_REGISTER_SUPPORTED",
            "READ_ONLY_HOST_REGISTER_SUPPORTED",
            "COMPUTE_PREEMPTION_SUPPORTED",
        )
        found = {}
        for name in names:
            attribute = getattr(driver.CUdevice_attribute, "CU_DEVICE_ATTRIBUTE_" + name)
            found[name] = int(call(driver.cuDeviceGetAttribute(attribute, gpu.device)))
        keeper.record("device attributes", ", ".join(f"{k} {v}" for k, v in found.items()))

    def map_times():
        plain = int(call(driver.cuMemAlloc(16 * GIB)))
        found = {}
        with keeper.child() as child:
            for size in (GIB, 16 * GIB, 64 * GIB):
                handle, fd = cuda.vmm_create(size)
                for read_only in (False, True):
                    took = []
                    for _ in range(3):
                        reply = child.ask("map_vmm", [fd], name="m", size=size, read_only=read_only)
                        took.append(reply["ms"])
                        child.ask("unmap", name="m")
                    found[f"vmm{' ro' if read_only else ''} {size // GIB} GiB"] = took
                os.close(fd)
                call(driver.cuMemRelease(handle))
            exported, took = cuda.ipc_export(plain), []
            for _ in range(3):
                took.append(child.ask("map_ipc", name="m", size=16 * GIB, handle=exported)["ms"])
                child.ask("unmap", name="m")
            found["ipc 16 GiB"] = took
        call(driver.cuMemFree(plain))
        text = "; ".join(f"{name} {span(took, 2)}" for name, took in found.items())
        keeper.record("import and map, ms", text, samples=found)

    def read_rates():
        size, rates = 8 * GIB, {}
        plain = int(call(driver.cuMemAlloc(size)))
        handle, fd = cuda.vmm_create(size)
        gpu.fill(plain, size, 4)
        mapped = cuda.vmm_map(handle, size)
        gpu.fill(mapped, size, 4)

        with keeper.child() as child:
            child.ask("map_ipc", name="ipc", size=size, handle=cuda.ipc_export(plain))
            child.ask("map_vmm", [fd], name="vmm", size=size)
            child.ask("map_vmm", [fd], name="vmm ro", size=size, read_only=True)
            for name in ("ipc", "vmm", "vmm ro"):
                reply = child.ask("checksum_loop", name=name, offset=0, size=size, seconds=0.3)
                rates[name] = [size / took / 1e9 for _, took in reply["samples"][3:]]
        text = ", ".join(f"{name} {np.median(r):.2f}" for name, r in rates.items())
        keeper.record(
            "read rate in another process, TB/s",
            text,
            tbps={k: summary(v) for k, v in rates.items()},
        )
        call(driver.cuMemFree(plain))
        cuda.vmm_unmap(mapped, size)
        os.close(fd)
        call(driver.cuMemRelease(handle))

    def read_only():
        size = GIB
        handle, fd = cuda.vmm_create(size)
        address = cuda.vmm_map(handle, size)
        gpu.fill(address, size, 6)
        wanted = gpu.checksum(address, size)
        with keeper.child("reader") as reader, keeper.child() as worker:
            for child in (reader, worker):
                child.ask("map_vmm", [fd], name="m", size=size, read_only=True)
            same = worker.ask("checksum", name="m", offset=0, size=size)["sum"] == wanted
            word = worker.ask("fault", kind="store_read_only", name="m")
            intact = gpu.checksum(address, size) == wanted
            other = reader.ask("checksum", name="m", offset=0, size=size)["sum"] == wanted
        keeper.record(
            "a store through a read-only mapping",
            f"{word.get('status', word)} in the worker; bytes intact {intact}, "
            f"other reader well {other}",
            same and intact and other and word.get("status") != "CUDA_SUCCESS",
        )
        with (
            keeper.child() as worker
        ):  # what asks for more than the keeper gave is not stopped by the fd
            reply = worker.ask("map_vmm", [fd], name="m", size=size, read_only=False)
            keeper.record(
                "the same descriptor mapped read-write by the importer",
                f"works, {reply['ms']:.2f} ms",
            )
        cuda.vmm_unmap(address, size)
        os.close(fd)
        call(driver.cuMemRelease(handle))

    def host_numa():
        for size in (GIB, 16 * GIB):
            start = now()
            handle, fd = cuda.vmm_create(size, "host_numa")
            created = ms_since(start)
            start = now()
            mine = cuda.vmm_map(handle, size, location="host_numa")
            mapped = ms_since(start)
            ctypes.memset(mine, 1, 64 * MIB)
            with keeper.child() as child, keeper.child() as second:
                took = [
                    c.ask(
                        "map_vmm", [fd], name="m", size=size, location="host_numa", deadline_s=60
                    )["ms"]
                    for c in (child, second)
                ]
                rates = child.ask("bandwidth", name="m", size=GIB, repeats=5)
                touch, retouch = (
                    child.ask("cpu_touch", name="m", size=GIB, deadline_s=60) for _ in range(2)
                )
                seen = ctypes.string_at(mine + GIB - 64, 64) == b"\x5a" * 64
                total = child.ask("checksum", name="m", offset=0, size=64 * MIB)["sum"]
                again = second.ask("checksum", name="m", offset=0, size=64 * MIB)["sum"]
            file = os.memfd_create("file")
            written = os.writev(file, [(ctypes.c_char * MIB).from_address(mine)])
            try:
                with mmap.mmap(fd, 2 * MIB):
                    without = "yes"
            except OSError as error:
                without = f"no ({error.strerror})"
            keeper.record(
                f"HOST_NUMA {size // GIB} GiB",
                f"create {created:.0f}, map {mapped:.1f}, in a worker {span(took)} ms; H2D "
                f"{np.median(rates['h2d']):.1f}, D2H {np.median(rates['d2h']):.1f} GB/s; "
                f"CPU memset {touch['gbps']:.1f}, again {retouch['gbps']:.1f} GB/s, "
                f"seen by the keeper {seen}; write(2) from it {written == MIB}; "
                f"mmap of the fd without CUDA: {without}",
                touch["right"] and seen and total == again,
                create_ms=created,
                map_ms=[mapped, *took],
                h2d_gbps=summary(rates["h2d"]),
                d2h_gbps=summary(rates["d2h"]),
            )
            os.close(file)
            cuda.vmm_unmap(mine, size)
            os.close(fd)
            call(driver.cuMemRelease(handle))

    def peers_of_host_numa():
        fd = os.memfd_create("arena")
        os.ftruncate(fd, 2 * GIB)
        with keeper.child() as child:
            allocated = child.ask("pinned", name="pinned", size=2 * GIB)["ms"]
            child.ask("map_memfd", [fd], name="memfd", size=2 * GIB)
            registered = child.ask("register", name="memfd", size=2 * GIB)["ms"]
            for name, took in (("pinned", allocated), ("memfd", registered)):
                rates = child.ask("bandwidth", name=name, size=GIB, repeats=5)
                touch = child.ask("cpu_touch", name=name, size=GIB)
                keeper.record(
                    "cudaHostAlloc 2 GiB" if name == "pinned" else "memfd 2 GiB, registered",
                    f"{took:.0f} ms; H2D {np.median(rates['h2d']):.1f}, "
                    f"D2H {np.median(rates['d2h']):.1f} GB/s; CPU memset {touch['gbps']:.1f} GB/s",
                    touch["right"],
                    h2d_gbps=summary(rates["h2d"]),
                    d2h_gbps=summary(rates["d2h"]),
                )
        os.close(fd)

    for measure in (attributes, map_times, read_rates, read_only, peers_of_host_numa, host_numa):
        keeper.attempt(measure.__name__, measure)


def hostmem(keeper: Keeper) -> None:
    largest, huge_memfd = 48 * GIB, []

    def deaths(what, prepare, repeats, ending="kill"):
        runs = []
        for _ in range(repeats):
            if runs and keeper.left() < 25:
                break
            with keeper.child(context=False) as child:
                prepared = prepare(child) or {}
                word = None
                if ending == "fault":
                    sent = now()
                    child.ask("fault", kind="address", deadline_s=60)
                    word = ms_since(sent)
                runs.append({**child.watch(child.kill(), 60), **prepared, "word": word})
        text = ", ".join(f"{k} {span([r[k] for r in runs])}" for k in ("eof", "eof_high", "pidfd"))
        if word is not None:
            text = f"fault->word {span([r['word'] for r in runs])}, kill->{text}"
        if "register_ms" in runs[0]:
            text += f" ms; pinned in {span([r['register_ms'] / 1000 for r in runs], 2)} s"
        else:
            text += " ms"
        keeper.record(what, text, runs=runs, pidfd_ms=summary(r["pidfd"] for r in runs))

    def with_context(child):
        child.ask("context")

    keeper.attempt("no CUDA", deaths, "no CUDA at all", lambda child: None, 3)
    keeper.attempt("context", deaths, "context only, 0 GiB", with_context, 4)

    def device_mapping(fd, size):
        def prepare(child):
            with_context(child)
            child.ask("map_vmm", [fd], name="m", size=size)

        return prepare

    def mapped_device():
        handle, fd = cuda.vmm_create(64 * GIB)
        deaths("64 GiB of device memory mapped (VMM)", device_mapping(fd, 64 * GIB), 3)
        os.close(fd)
        call(driver.cuMemRelease(handle))

    keeper.attempt("64 GiB device", mapped_device)

    def pinned(fd, size, huge=False, only_mapped=False, drop_ptes=False):
        def prepare(child):
            with_context(child)
            if fd is None:
                child.ask("map_anonymous", name="m", size=size, deadline_s=60)
            else:
                child.ask("map_memfd", [fd], name="m", size=size, huge=huge, deadline_s=60)
            if only_mapped:
                return None
            done = child.ask("register", name="m", size=size, deadline_s=60)
            if drop_ptes:
                child.ask("drop_page_table", name="m")
                rates = child.ask("bandwidth", name="m", size=GIB, repeats=3, deadline_s=60)
                return {"register_ms": done["ms"], "d2h_gbps": float(np.median(rates["d2h"]))}
            return {"register_ms": done["ms"]}

        return prepare

    def with_memfd(label, flags, huge):
        fd = os.memfd_create("arena", flags)
        os.ftruncate(fd, largest)
        address, start = cuda.map_shared(fd, largest), now()
        try:
            if huge and not flags & os.MFD_HUGETLB:
                cuda.advise(address, largest, cuda.MADV_HUGEPAGE)
            cuda.populate(address, largest, cuda.MADV_POPULATE_WRITE)
            filled, collapsed = ms_since(start) / 1000, None
            if huge and not flags & os.MFD_HUGETLB:
                share = cuda.page_kib_of(address).get("ShmemPmdMapped", 0) * 1024 / largest
                if share < 0.9:
                    start = now()
                    cuda.populate(address, largest, cuda.MADV_COLLAPSE)
                    collapsed = ms_since(start) / 1000
                    share = cuda.page_kib_of(address).get("ShmemPmdMapped", 0) * 1024 / largest
                if share < 0.5:
                    raise OSError(f"only {100 * share:.0f} % of it is in huge pages")
                huge_memfd.append(share)
                label += f", {100 * share:.0f} % huge"
            keeper.record(
                f"{label}: 48 GiB filled",
                f"{filled:.1f} s by 8 threads"
                + (f", collapsed {collapsed:.1f} s" if collapsed else ""),
            )
            for size, options, repeats, ending in (
                (largest, {"only_mapped": True}, 2, "kill"),
                (16 * GIB, {}, 2, "kill"),
                *(() if huge else ((16 * GIB, {"drop_ptes": True}, 2, "kill"),)),
                (largest, {}, 2, "kill"),
            ):
                what = f"{label}: {size // GIB} GiB " + (
                    "mapped only" if "only_mapped" in options else "registered"
                )
                what += ", then MADV_DONTNEED" if "drop_ptes" in options else ""
                what += ", illegal address" if ending == "fault" else ""
                prepare = pinned(fd, size, huge=huge, **options)
                keeper.attempt(what, deaths, what, prepare, repeats, ending)
        finally:
            cuda.libc.munmap(address, largest)
            os.close(fd)

    meminfo = {
        line.split(":")[0]: int(line.split()[1])
        for line in Path("/proc/meminfo").read_text().splitlines()
    }
    thp = Path("/sys/kernel/mm/transparent_hugepage")
    settings = {
        f: (thp / f).read_text().strip() for f in ("enabled", "shmem_enabled") if (thp / f).exists()
    }
    keeper.record(
        "huge page settings", f"{settings}, HugePages_Free {meminfo.get('HugePages_Free')}"
    )

    def host_numa(size):
        handle, fd = cuda.vmm_create(size, "host_numa")

        def prepare(child, location):
            with_context(child)
            place = {"name": "m", "size": size, "location": location}
            return {"register_ms": child.ask("map_vmm", [fd], **place, deadline_s=60)["ms"]}

        what = f"HOST_NUMA {size // GIB} GiB mapped for "
        if size == largest:
            deaths(what + "GPU and CPU", lambda child: prepare(child, "host_numa"), 2)
        alone = what + "the GPU alone"
        deaths(alone, lambda child: prepare(child, "device"), 3)
        deaths(alone + ", illegal address", lambda child: prepare(child, "device"), 3, "fault")
        os.close(fd)
        call(driver.cuMemRelease(handle))

    for size in (16 * GIB, largest):
        keeper.attempt("HOST_NUMA", host_numa, size)
    keeper.attempt("memfd 4 KiB", with_memfd, "memfd 4 KiB pages", 0, False)
    if meminfo.get("HugePages_Free", 0) * 2 * MIB >= largest:
        keeper.attempt("memfd hugetlb", with_memfd, "memfd hugetlb", os.MFD_HUGETLB, True)
    else:
        keeper.attempt("memfd THP", with_memfd, "memfd THP", 0, True)
        if not huge_memfd:
            for size, repeats in ((16 * GIB, 2), (largest, 1)):
                what = f"anonymous THP: {size // GIB} GiB registered"
                keeper.attempt(what, deaths, what, pinned(None, size), repeats)
