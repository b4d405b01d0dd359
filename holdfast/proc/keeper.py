"""The keeper: owns the memory that must survive a worker (weights slab, KV pool), launches nothing.

It makes both slabs (memfds, or GPU memory behind descriptors), hands them to the supervisor over
its control channel, and keeps its own descriptors, so that the bytes live as long as it does. Where
a GPU's memory cannot be shared between processes it owns none and says why; every worker then makes
its own. It is the home of the invariant "the weights are the bytes that were loaded": the first
worker of a load reports the slab's checksum, every later one must find the same. Started by the
supervisor; never imports torch, holds no context of a GPU while it waits.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from holdfast.cuda_driver import CudaError, Driver, parse_device
from holdfast.errors import HoldfastError, LinkError
from holdfast.proc import cuda_memory, memfd
from holdfast.proc.child import EXIT_FAULT, EXIT_OPERATOR, boot
from holdfast.proc.control import Control, Message

# It only waits for the supervisor, whose death is end of file; the deadline is a heartbeat.
_WAIT_S = 60.0


class Keeper:
    """What the keeper remembers: the descriptors and the weights' checksum."""

    def __init__(self, control: Control, config: dict[str, Any]) -> None:
        self._control = control
        self._weights_sum: int | None = None
        sizes = {name: config[name] for name in ("weights_bytes", "pool_bytes")}
        self._fds, unshared = make_slabs(config.get("device", "cpu"), **sizes)
        control.send({"type": "ready", **sizes, "unshared": unshared}, self._fds)

    def run(self) -> int:
        """Obey the supervisor until it says stop or is gone."""
        while True:
            received = self._control.wait(_WAIT_S)
            if received is None:
                continue
            message, _ = received
            if message["type"] == "stop":
                return 0
            self._obey(message)

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)

    def _obey(self, message: Message) -> None:
        if message["type"] == "weights_sum":
            held = self.hold(message["sum"], loaded=message["loaded"])
            verdict = {"process": message["process"], "ok": held, "step": message["step"]}
            self._control.send({"type": "weights", **verdict})
        elif message["type"] == "weights_forget":
            self._weights_sum = None
        elif message["type"] == "ping":
            self._control.send({"type": "pong"})
        else:
            raise LinkError(f"control message {message['type']!r} from the supervisor")

    def hold(self, weights_sum: int, *, loaded: bool) -> bool:
        """Whether a worker that found this checksum in the slab may serve.

        loaded=False: the worker has just loaded the weights; what it found is what was loaded.
        """
        if not loaded:
            self._weights_sum = weights_sum
        return weights_sum == self._weights_sum


def make_slabs(device: str, *, weights_bytes: int, pool_bytes: int) -> tuple[list[int], str]:
    """(descriptors of weights and pool, ""), or ([], why) where workers must own their memory.

    Raises OptionError, with the numbers, when there is no room.
    """
    slabs = [("weights", weights_bytes, "MODEL"), ("kv-pool", pool_bytes, "--kv-pages")]
    kind, ordinal = parse_device(device)
    if kind == "cpu":
        return [memfd.make(name, size, option=option) for name, size, option in slabs], ""
    driver = Driver()
    try:
        return cuda_memory.make_slabs(driver, ordinal, slabs), ""
    except CudaError as error:
        return [], str(error)


def main() -> int:
    start = boot()
    control = start.control()
    try:
        keeper = Keeper(control, start.config)
        try:
            return keeper.run()
        finally:
            keeper.close()
    except LinkError:
        return EXIT_FAULT  # The supervisor is gone; there is nobody to tell.
    except HoldfastError as error:
        control.fault(error)
        return EXIT_OPERATOR


if __name__ == "__main__":
    sys.exit(main())
