"""The model families one decoder serves: how each reads its config.json and names its tensors.

Owns what differs between families as data: architecture name, which keys of config.json it
understands, where biases and q/k norms stand, and how checkpoint tensors are joined into the
decoder's parameters. Called by model.spec and model.weights. Torch-free; knows no files and no
maths. Invariant: a key of config.json is understood, known to be harmless, or refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


@dataclass(frozen=True, slots=True)
class Family:
    """What sets one family apart. `head_dim` is the default where the config names none
    (None = hidden_size / heads); `qkv_bias_always` = whatever the config says."""

    name: str
    architecture: str
    head_dim: int | None
    qk_norm: bool
    qkv_bias_always: bool
    mlp_bias_allowed: bool


FAMILIES = (
    Family("llama", "LlamaForCausalLM", None, False, False, True),
    Family("qwen2", "Qwen2ForCausalLM", None, False, True, False),
    Family("qwen3", "Qwen3ForCausalLM", 128, True, False, False),
)

# Keys that model.spec reads and either honours or refuses by value.
UNDERSTOOD_KEYS = _words(
    """
    architectures model_type vocab_size hidden_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim intermediate_size rms_norm_eps rope_theta rope_scaling
    rope_parameters max_position_embeddings tie_word_embeddings attention_bias mlp_bias hidden_act
    dtype torch_dtype bos_token_id eos_token_id sliding_window use_sliding_window
    max_window_layers layer_types quantization_config
    """
)

# Keys that cannot change the logits of a causal decoder at inference: training and initialisation,
# bookkeeping of transformers and of training tools, defaults of `generate` that old versions
# stored here, labels of classifiers. `pretraining_tp` slices the same product in pieces.
HARMLESS_KEYS = _words(
    """
    _name_or_path name_or_path transformers_version use_cache initializer_range attention_dropout
    hidden_dropout pad_token_id pretraining_tp output_attentions output_hidden_states
    return_dict return_dict_in_generate id2label label2id num_labels problem_type
    finetuning_task task_specific_params tokenizer_class prefix _attn_implementation
    _attn_implementation_autoset attn_implementation torchscript use_bfloat16 tf_legacy_loss
    unsloth_fixed unsloth_version model_max_length max_length min_length max_new_tokens
    min_new_tokens do_sample temperature top_k top_p typical_p num_beams num_beam_groups
    num_return_sequences diversity_penalty length_penalty repetition_penalty
    encoder_no_repeat_ngram_size no_repeat_ngram_size early_stopping begin_suppress_tokens
    suppress_tokens bad_words_ids forced_bos_token_id forced_eos_token_id decoder_start_token_id
    sep_token_id exponential_decay_length_penalty remove_invalid_values output_scores
    chunk_size_feed_forward router_aux_loss_coef transformers.js_config
    """
)

# Keys that are harmless at these values only; any other value means another kind of model.
NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, []),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1, 1.0),
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of the decoder and the checkpoint tensors stacked in it along its first axis."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def stacked(name: str, *parts: tuple[str, tuple[int, ...]]) -> Parameter:
    """Parameter `name` made of `parts` (checkpoint name, shape), one below the other."""
    rows = sum(shape[0] for _, shape in parts)
    return Parameter(name, (rows, *parts[0][1][1:]), tuple(parts))


def parameters(
    *,
    layers: int,
    vocab_size: int,
    hidden: int,
    query: int,
    key: int,
    head_dim: int,
    intermediate: int,
    tied: bool,
    qk_norm: bool,
    qkv_bias: bool,
    output_bias: bool,
    mlp_bias: bool,
) -> list[Parameter]:
    """Every tensor of the decoder, in the order in which the slab holds them.

    query = heads * head_dim and key = kv_heads * head_dim are rows of q and of k (and v). The three
    projections of attention read the same input, so they are one matrix; so are gate and up: fewer,
    larger products.
    """
    found = [stacked("embed", ("model.embed_tokens.weight", (vocab_size, hidden)))]
    for layer in range(layers):
        own, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        attention, mlp = theirs + "self_attn.", theirs + "mlp."
        sizes = (("q", query), ("k", key), ("v", key))
        halves = ("gate", "up")
        found.append(stacked(own + "input_norm", (theirs + "input_layernorm.weight", (hidden,))))
        found.append(
            stacked(own + "qkv", *((f"{attention}{n}_proj.weight", (r, hidden)) for n, r in sizes))
        )
        if qkv_bias:
            parts = ((f"{attention}{n}_proj.bias", (r,)) for n, r in sizes)
            found.append(stacked(own + "qkv_bias", *parts))
        if qk_norm:
            for n in ("q_norm", "k_norm"):
                found.append(stacked(own + n, (f"{attention}{n}.weight", (head_dim,))))
        found.append(stacked(own + "output", (f"{attention}o_proj.weight", (hidden, query))))
        if output_bias:
            found.append(stacked(own + "output_bias", (f"{attention}o_proj.bias", (hidden,))))
        post = theirs + "post_attention_layernorm.weight"
        found.append(stacked(own + "mlp_norm", (post, (hidden,))))
        parts = ((f"{mlp}{n}_proj.weight", (intermediate, hidden)) for n in halves)
        found.append(stacked(own + "gate_up", *parts))
        if mlp_bias:
            parts = ((f"{mlp}{n}_proj.bias", (intermediate,)) for n in halves)
            found.append(stacked(own + "gate_up_bias", *parts))
        found.append(stacked(own + "down", (f"{mlp}down_proj.weight", (hidden, intermediate))))
        if mlp_bias:
            found.append(stacked(own + "down_bias", (f"{mlp}down_proj.bias", (hidden,))))
    found.append(stacked("norm", ("model.norm.weight", (hidden,))))
    if not tied:
        found.append(stacked("head", ("lm_head.weight", (vocab_size, hidden))))
    return found
