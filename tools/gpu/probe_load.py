"""A graph loop like a decode loop, and the warm-up of a standby, as commands of a probe child."""

from __future__ import annotations

import threading
import time

import numpy as np
from cuda.bindings import driver
from probe_cuda import GIB, MIB, call, ms_since, now

LOOP_LAUNCHES, LOOP_MS, LOOP_GRID, LOOP_BLOCK = 144, 5.0, 66, 512


class Load:
    """Commands of a child that serves, and of a torch process that warms up beside it."""

    def loop_start(self):
        """Replay a graph of about 5 ms, with one small copy in and one out, until loop_stop."""
        stream, weights = self.gpu.new_stream(), int(call(driver.cuMemAlloc(8 * GIB)))
        host = int(call(driver.cuMemHostAlloc(MIB, 0)))
        self.gpu.fill(weights, 8 * GIB, 3)
        piece = 32 * MIB
        for _ in range(3):
            graph = self.loop_graph(stream, weights, piece)
            took = []
            for _ in range(4):
                start = now()
                self.loop_step(graph, stream, weights, host)
                took.append(ms_since(start))
            piece = min(int(piece * LOOP_MS / min(took)) // 4096 * 4096, 2 * GIB)
        graph = self.loop_graph(stream, weights, piece)
        self.loop_samples, self.loop_running = [], True

        def run():
            self.gpu.use()
            while self.loop_running:
                start = now()
                self.loop_step(graph, stream, weights, host)
                self.loop_samples.append((start, now() - start))

        self.loop_thread = threading.Thread(target=run, daemon=True)
        self.loop_thread.start()
        return {"piece_mib": piece / MIB}

    def loop_graph(self, stream, weights, piece):
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        call(driver.cuStreamBeginCapture(stream, mode))
        for i in range(LOOP_LAUNCHES):
            at = weights + i * piece % (8 * GIB - piece) // 4096 * 4096
            self.gpu.launch(
                "checksum",
                at,
                piece // 16,
                self.gpu.result + 8,
                grid=LOOP_GRID,
                block=LOOP_BLOCK,
                stream=stream,
            )
        return call(driver.cuGraphInstantiate(call(driver.cuStreamEndCapture(stream)), 0))

    def loop_step(self, graph, stream, weights, host):
        call(driver.cuMemcpyHtoDAsync(self.gpu.result + 2048, host, 2048, stream))
        call(driver.cuGraphLaunch(graph, stream))
        call(driver.cuMemcpyDtoHAsync(host + 4096, self.gpu.result, 2048, stream))
        self.gpu.synchronize(stream)

    def loop_stop(self, path):
        self.loop_running = False
        self.loop_thread.join(10)
        np.save(path, np.array(self.loop_samples, dtype=np.int64))
        return {"steps": len(self.loop_samples)}

    def torch_import(self):
        start = now()
        import torch

        self.torch = torch
        return {"ms": ms_since(start)}

    def torch_context(self):
        start = now()
        self.torch.zeros(1, device="cuda")
        self.torch.cuda.synchronize()
        return {"ms": ms_since(start)}

    def torch_warm(self):
        """First kernels and cuBLAS, as the warm-up of a standby would run them."""
        torch, start = self.torch, now()
        draw = torch.Generator("cuda").manual_seed(0)
        shape = (1024, 1024)
        self.layers = [
            torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=draw) * 0.03
            for _ in range(36)
        ]
        self.torch_forward(torch.ones(8, 1024, device="cuda", dtype=torch.bfloat16))
        torch.cuda.synchronize()
        return {"ms": ms_since(start)}

    def torch_forward(self, x, layers=None):
        for weight in layers or self.layers:
            x = x + self.torch.nn.functional.silu(x @ weight)
            x = x * self.torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype)
        return x

    def torch_eager(self, graphs, layers_at_once, pause_s):
        """Each shape once, a few layers at a time, so that the GPU is never taken for long."""
        torch, start = self.torch, now()
        for i in range(graphs):
            x = torch.ones(8 * (i + 1), 1024, device="cuda", dtype=torch.bfloat16)
            for at in range(0, len(self.layers), layers_at_once):
                x = self.torch_forward(x, self.layers[at : at + layers_at_once])
                torch.cuda.synchronize()
                time.sleep(pause_s)
        return {"ms": ms_since(start)}

    def torch_capture(self, graphs, eager=True):
        torch, start = self.torch, now()
        self.graphs = []
        for i in range(graphs):
            x = torch.ones(8 * (i + 1), 1024, device="cuda", dtype=torch.bfloat16)
            if eager:
                self.torch_forward(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = self.torch_forward(x)
            self.graphs.append((graph, x, y))
        torch.cuda.synchronize()
        return {"ms": ms_since(start)}

    def torch_replay(self, pause_s=0.0):
        start = now()
        for graph, _, _ in self.graphs:
            graph.replay()
            if pause_s:
                self.torch.cuda.synchronize()
                time.sleep(pause_s)
        self.torch.cuda.synchronize()
        return {"ms": ms_since(start)}
