"""vLLM's side of timed generations: a script for the Python that has vLLM, which need not have us.

    PYTHON run_vllm.py JOB.json

JOB: {"llm": keyword arguments of vllm.LLM, "tasks": [{"key", "prompts", "output_tokens",
"temperature"}]}. Without tasks it says its version and ends. stdout has one JSON object a line:
{"event": "version" | "ready" | "spent" | "failed" | "end", ...}; whatever else anybody prints goes
to stderr. Only the standard library and vllm are imported.
"""

import importlib.metadata
import json
import os
import sys
import time

# What a machine without a network needs, and the sampler that the peers' figures were taken with.
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}


def main():
    # vLLM logs to stdout, and so do processes that it starts: they get stderr.
    protocol = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**event):
        protocol.write(json.dumps(event) + "\n")
        protocol.flush()

    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    started_s = time.perf_counter()
    if not job["tasks"] and (version := installed()):
        say(event="version", name="vllm", version=version)
        say(event="end")
        return 0
    try:
        import vllm
    except ImportError as error:
        say(event="failed", kind="import", message=f"vllm cannot be imported: {error}")
        return 1
    say(event="version", name="vllm", version=vllm.__version__)
    if job["tasks"]:
        llm = vllm.LLM(**job["llm"])
        say(event="ready", seconds=time.perf_counter() - started_s)
        for task in job["tasks"]:
            seconds = generate(vllm, llm, task)
            say(event="spent", key=task["key"], seconds=seconds)
    say(event="end")
    return 0


def installed():
    """The version of an installed vllm, without the time that its import takes; else None."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return None


def generate(vllm, llm, task):
    """Seconds from the first request handed in to the last token out."""
    prompts = [{"prompt_token_ids": prompt} for prompt in task["prompts"]]
    params = [
        vllm.SamplingParams(
            temperature=task["temperature"], ignore_eos=True, max_tokens=count, detokenize=False
        )
        for count in task["output_tokens"]
    ]
    started_s = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started_s
    given = [len(output.outputs[0].token_ids) for output in outputs]
    if given != task["output_tokens"]:
        raise RuntimeError(f"{task['key']}: gave {sum(given)} tokens, not as many as were asked")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
