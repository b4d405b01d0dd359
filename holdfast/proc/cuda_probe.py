"""What a GPU has, asked in a process of its own: `python -m holdfast.proc.cuda_probe ORDINAL`.

Free memory can only be asked from within a context, and whoever holds a context keeps 0.5 GB of the
GPU and must not fork any more; so neither the command line nor the supervisor makes one. `probe`
starts this module, waits with a deadline and reads one line of JSON. No torch.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from holdfast.cuda_driver import CudaError, Driver
from holdfast.errors import OperatorError, OptionError
from holdfast.proc import cuda_memory
from holdfast.proc.child import module_command, module_environment

# Making a context takes 0.2 s on an idle machine; a first one after boot has taken seconds.
PROBE_S = 60.0


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, before anything of ours is on it.

    total_bytes, free_bytes: of its memory. unshared: why its memory cannot be shared between
    processes, "" when it can.
    """

    ordinal: int
    name: str
    total_bytes: int
    free_bytes: int
    unshared: str


def probe(ordinal: int) -> Gpu:
    """Ask a GPU. Raises OptionError("--device") when it, a driver or torch's half is not there."""
    if not torch_has_cuda():
        raise OptionError("--device", "the torch that is installed was built without CUDA; say cpu")
    try:
        done = subprocess.run(
            module_command("holdfast.proc.cuda_probe", str(ordinal)),
            env=module_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROBE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise OptionError(
            "--device", f"GPU {ordinal} does not answer within {PROBE_S:g} s"
        ) from None
    try:
        said = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip() or "no word").splitlines()[-1]
        raise OptionError(
            "--device", f"GPU {ordinal} cannot be asked (exit {done.returncode}): {last}"
        ) from None
    if "error" in said:
        raise OptionError("--device", said["error"])
    return Gpu(**said)


def torch_has_cuda() -> bool:
    """Whether the installed torch has its CUDA half; found without the seconds of importing it."""
    spec = importlib.util.find_spec("torch")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    return any((Path(folder) / "lib" / "libtorch_cuda.so").exists() for folder in folders)


def devices_there() -> int:
    """GPUs that the driver shows, 0 without a driver. Makes no context."""
    try:
        return Driver().device_count()
    except (OperatorError, CudaError):
        return 0


def ask(ordinal: int, driver: Driver) -> Gpu:
    """In this process; makes a context and gives it back. Raises OptionError, CudaError."""
    count = driver.device_count()
    if ordinal >= count:
        there = "none is" if count == 0 else f"cuda:0 to cuda:{count - 1} are"
        raise OptionError("--device", f"there is no cuda:{ordinal}; {there} there")
    facts = driver.facts(ordinal)
    driver.enter(ordinal)
    try:
        unshared = cuda_memory.shares(driver, ordinal)
        free = driver.free_bytes()
    finally:
        driver.leave(ordinal)
    return Gpu(ordinal, facts.name, facts.total_bytes, free, unshared)


def main() -> int:
    try:
        gpu = ask(int(sys.argv[1]), Driver())
    except OptionError as error:
        # `probe` puts the option's name before it again.
        said = {"error": str(error).removeprefix(f"{error.option}: ")}
    except CudaError as error:
        said = {"error": f"GPU {sys.argv[1]} cannot be used: {error}"}
    else:
        said = {field: getattr(gpu, field) for field in Gpu.__dataclass_fields__}
    print(json.dumps(said))
    return 0


if __name__ == "__main__":
    sys.exit(main())
