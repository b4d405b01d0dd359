#!/usr/bin/env bash
# Make a virtual environment and install Holdfast into it, in place, with its test extras.
#
#   tools/install.sh VENV      PYTHON=... picks the interpreter
#
# Which torch: with an NVIDIA GPU the CUDA build and the [cuda] extra. Without one the CPU build,
# from the configured index if it has one, else from PyTorch's own CPU index; where neither can be
# had, the plain pin (which brings CUDA libraries along: 2.7 GB, said before it is fetched). On CI
# that last step is an error instead. What pip would fetch is asked with a dry run.
set -euo pipefail

venv=${1:?usage: tools/install.sh VENV}
cd "$(dirname "$0")/.."
cpu_index=https://download.pytorch.org/whl/cpu
report=.resolve.json
trap 'rm -f "$report"' EXIT

say() { printf 'holdfast setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 2; }

usable() {
    command -v "$1" >/dev/null 2>&1 &&
        "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

pick_python() {
    local name
    if [ -n "${PYTHON:-}" ]; then
        usable "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.11 or later"
        echo "$PYTHON"
        return
    fi
    for name in python3 python3.13 python3.12 python3.11 python3.14; do
        if usable "$name"; then
            echo "$name"
            return
        fi
    done
    die "no Python 3.11 or later found; install one, or name it: make serve PYTHON=/path/to/python3"
}

if ! [ -x "$venv/bin/python" ] || ! usable "$venv/bin/python"; then
    python=$(pick_python)
    say "making $venv with $("$python" --version)"
    # Debian and Ubuntu ship venv apart from python.
    "$python" -m venv --clear "$venv" ||
        die "could not make $venv; on Debian or Ubuntu: apt-get install python3-venv"
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
    say "NVIDIA GPU found: installing with CUDA"
    "${pip[@]}" install -qq -e '.[cuda,test]'
    say "done"
    exit 0
fi

# Whether a plain install with these extra options stays free of CUDA wheels.
cpu_only() {
    "${pip[@]}" install -qq -c constraints.txt --dry-run --report "$report" "$@" -e '.[test]' &&
        ! grep -q '"name": "nvidia-' "$report"
}

say "no GPU: looking for a CPU build of torch"
extra=()
if ! cpu_only; then
    # Few retries: where this index cannot be reached, that should be known in seconds.
    extra=(--extra-index-url "$cpu_index" --retries 1 --timeout 10)
    if ! cpu_only "${extra[@]}" 2>/dev/null; then
        extra=()
        [ -z "${CI:-}" ] || die "this would install CUDA wheels on a CI machine without a GPU;" \
            "give pip an index that has the CPU build of the torch in constraints.txt"
        say "no CPU build of torch can be reached: installing the plain one (about 2.7 GB)"
    fi
fi
say "installing (a minute or so)"
"${pip[@]}" install -qq -c constraints.txt "${extra[@]}" -e '.[test]'
say "done"
