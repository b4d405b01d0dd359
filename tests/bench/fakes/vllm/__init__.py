"""As much of vllm as holdfast.bench.peers.run_vllm touches. FAKE_VLLM says how it misbehaves."""

import os
import sys
import time
from types import SimpleNamespace

__version__ = "0.0.fake"
MODE = os.environ.get("FAKE_VLLM", "")
SECONDS_A_TOKEN = 0.005

print("INFO: a log line on stdout, as vllm prints them")


class SamplingParams:
    def __init__(self, *, temperature, ignore_eos, max_tokens, detokenize):
        assert ignore_eos and not detokenize and 0 <= temperature <= 2
        self.max_tokens = max_tokens


class LLM:
    def __init__(self, *, model, load_format, skip_tokenizer_init, max_model_len, **options):
        assert os.path.exists(os.path.join(model, "config.json")) and skip_tokenizer_init
        assert load_format in ("dummy", "auto") and set(options) == {
            "max_num_seqs",
            "gpu_memory_utilization",
            "dtype",
            "disable_log_stats",
        }
        if MODE == "no-memory":
            raise ValueError("no available memory for the cache blocks")
        if MODE == "hang":
            time.sleep(60)
        if MODE == "die":
            print("CUDA error: an illegal memory access was encountered", file=sys.stderr)
            os._exit(134)

    def generate(self, prompts, params, use_tqdm):
        assert not use_tqdm and len(prompts) == len(params)
        counts = [one.max_tokens for one in params]
        time.sleep(SECONDS_A_TOKEN * max(counts))
        if MODE == "short":
            counts[-1] -= 1
        assert all(prompt["prompt_token_ids"] for prompt in prompts)
        return [
            SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * count)]) for count in counts
        ]
