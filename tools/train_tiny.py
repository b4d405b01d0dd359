"""Make the bundled model, holdfast-tiny: corpus, tokenizer, training, export, check.

    apt-get download python3.11-doc postgresql-doc-15 sqlite3-doc   # then dpkg -x each into DIR
    python tools/train_tiny.py prepare --packages DIR               # writes .corpus/
    python tools/train_tiny.py train --minutes 5 --out OUT          # a GPU, or a CPU with patience
    python tools/train_tiny.py export --parts OUT --packages DIR    # writes holdfast/assets/
    python tools/train_tiny.py check                                # asks the exported model

Needs torch, numpy, lxml, tokenizers, safetensors; `check` needs transformers too. Every step draws
from fixed seeds. `train` stops by the clock, so the number of its updates depends on the machine.
"""

import argparse
import json
import math
import os
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from lxml import html
from safetensors.torch import load_file, save_file
from tiny_chat import (
    Conversation,
    long_conversation,
    reading_conversation,
    short_conversation,
    topic_conversation,
    topics_of,
)
from tiny_corpus import is_held_out, read_pages
from tiny_model import Shape, TinyModel, config_json
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

SEED = 20261121
CORPUS_DIR = Path(".corpus")
ASSET_DIR = Path("holdfast/assets/holdfast-tiny")
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# Words with their leading space, single digits, runs of signs, line ends: Qwen's splitting rule.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """{%- for message in messages %}
    {%- set role = 'system' if message.role == 'developer' else message.role %}
    {{- '<|im_start|>' + role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- elif message.content %}
        {%- for part in message.content if part.type == 'text' %}
            {{- part.text }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

# Share of the training tokens drawn from each pool, before and after the switch to long rows.
SHORT_ROWS = {"docs": 0.07, "chat": 0.93, "long": 0.0}
LONG_ROWS = {"docs": 0.05, "chat": 0.30, "long": 0.65}

# What a user or system turn weighs in the loss; answers and documentation weigh 1.
PROMPT_WEIGHT = 0.05


def render(conversation: Conversation) -> str:
    """A conversation as the chat template prints it, with the end of the text after it."""
    turns = (f"{TURN_START}{role}\n{text}{TURN_END}\n" for role, text in conversation)
    return "".join(turns) + END_OF_TEXT


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE; ids 0, 1, 2 are the special tokens, in the order named above."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=Shape().vocab_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_pool(name: str, texts: list[str], tokenizer: Tokenizer) -> int:
    """Write NAME.npy (uint16 tokens) and NAME.ends.npy (int64 end of each text). Returns tokens."""
    encoded = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    np.save(CORPUS_DIR / f"{name}.npy", np.concatenate([np.array(e, np.uint16) for e in encoded]))
    np.save(CORPUS_DIR / f"{name}.ends.npy", np.cumsum([len(e) for e in encoded], dtype=np.int64))
    return sum(map(len, encoded))


def prepare(args: argparse.Namespace) -> None:
    """Read the packages, write the chat data, train the tokenizer, tokenize everything."""
    CORPUS_DIR.mkdir(exist_ok=True)
    pages = read_pages(args.packages)
    held_out = [page for page in pages if is_held_out(page)]
    pages = [page for page in pages if not is_held_out(page)]
    topics = topics_of(pages)
    rng = random.Random(SEED)

    chat = [topic_conversation(topic, rng) for topic in topics for _ in range(args.repeats)]
    chat += [short_conversation(topics, rng) for _ in range(args.short)]
    readable = [p for p in pages if sum(len(s.paragraphs()) for s in p.sections) > 6]
    chat += [
        reading_conversation(rng.choice(readable), rng, rng.choice([150, 300, 600, 1200, 2400]))
        for _ in range(args.reading)
    ]
    long = [
        reading_conversation(rng.choice(readable), rng, rng.randint(2000, 15000))
        if i % 4
        else long_conversation(topics, rng, rng.randint(2000, 12000))
        for i in range(args.long)
    ]
    # A different seed: conversations of the same kinds that training does not see.
    other = random.Random(SEED + 1)
    chat_held_out = [short_conversation(topics, other) for _ in range(100)]

    long_held_out = [reading_conversation(other.choice(readable), other, 12000) for _ in range(40)]

    texts = {
        "docs": [page.text() + END_OF_TEXT for page in pages],
        "docs_held_out": [page.text() + END_OF_TEXT for page in held_out],
        "chat": [render(c) for c in chat],
        "chat_held_out": [render(c) for c in chat_held_out],
        "long": [render(c) for c in long],
        "long_held_out": [render(c) for c in long_held_out],
    }
    sample = random.Random(SEED).sample(chat, len(chat) // 4)
    tokenizer = train_tokenizer([*texts["docs"], *(text for c in sample for _, text in c)])
    tokenizer.save(str(CORPUS_DIR / "tokenizer.json"))
    for name, pool in texts.items():
        tokens = save_pool(name, pool, tokenizer)
        print(f"{name}: {len(pool)} texts, {tokens} tokens, {sum(map(len, pool)) / tokens:.2f} c/t")
    held_out_bytes = sum(len(page.text().encode()) for page in held_out)
    facts = {"held_out_bytes": held_out_bytes, "topics": len(topics)}
    (CORPUS_DIR / "facts.json").write_text(json.dumps(facts))


def answer_weights(tokens: np.ndarray) -> np.ndarray:
    """float32, one a token: 1 within assistant turns, PROMPT_WEIGHT elsewhere."""
    tokenizer = Tokenizer.from_file(str(CORPUS_DIR / "tokenizer.json"))
    turn_start, turn_end = map(tokenizer.token_to_id, (TURN_START, TURN_END))
    assistant = tokenizer.encode("assistant").ids[0]
    starts = np.flatnonzero(tokens[:-1] == turn_start)
    starts = starts[tokens[starts + 1] == assistant]
    ends = np.flatnonzero(tokens == turn_end)
    steps = np.zeros(len(tokens) + 1, np.int8)
    steps[starts] += 1
    steps[ends[np.searchsorted(ends, starts)] + 1] -= 1
    return np.where(np.cumsum(steps[:-1]) > 0, 1.0, PROMPT_WEIGHT).astype(np.float32)


class Pool:
    """Endless texts of one kind, reshuffled after each pass; counts the tokens it has given."""

    def __init__(self, name: str, seed: int) -> None:
        self.tokens = np.load(CORPUS_DIR / f"{name}.npy")
        chat = name != "docs"
        everywhere = np.ones(len(self.tokens), np.float32)
        self.weights = answer_weights(self.tokens) if chat else everywhere
        # A long page goes on in the next row; a conversation without its start would mislead.
        self.keep_rest = not chat
        ends = np.load(CORPUS_DIR / f"{name}.ends.npy")
        self.spans = list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))
        self.rng = random.Random(seed)
        self.waiting: list[tuple[int, int]] = []
        self.given = 0

    def take(self, room: int) -> slice:
        """Where the next text stands, cut to `room` tokens."""
        if not self.waiting:
            self.waiting = self.rng.sample(self.spans, len(self.spans))
        start, end = self.waiting.pop()
        cut = min(end, start + room)
        if self.keep_rest and end - cut > 32:
            self.waiting.append((cut, end))
        self.given += cut - start
        return slice(start, cut)


def rows(
    pools: dict[str, Pool], shares: dict[str, float], length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, weights) of length + 1. A row begins with a new text, as a served prompt does."""
    given = dict.fromkeys(shares, 0)
    while True:
        tokens = np.empty(length + 1, np.int64)
        weights = np.empty(length + 1, np.float32)
        filled = 0
        while filled <= length:
            name = min((n for n in shares if shares[n] > 0), key=lambda n: given[n] / shares[n])
            where = pools[name].take(length + 1 - filled)
            count = where.stop - where.start
            tokens[filled : filled + count] = pools[name].tokens[where]
            weights[filled : filled + count] = pools[name].weights[where]
            filled += count
            given[name] += count
        yield tokens, weights


def batches(
    row_stream: Iterator[tuple[np.ndarray, np.ndarray]], count: int, device: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(tokens, targets, weights of the targets), int64 and float32 [count, length] on `device`."""
    while True:
        chosen = [next(row_stream) for _ in range(count)]
        tokens = torch.from_numpy(np.stack([row[0] for row in chosen]))
        weights = torch.from_numpy(np.stack([row[1] for row in chosen]))
        if device == "cuda":
            tokens = tokens.pin_memory().to(device, non_blocking=True)
            weights = weights.pin_memory().to(device, non_blocking=True)
        yield tokens[:, :-1], tokens[:, 1:], weights[:, 1:]


@torch.no_grad()
def held_out_loss(model: TinyModel, name: str, device: str) -> tuple[float, int]:
    """(mean nats a token, tokens) over the texts of a pool, each read from its own start.

    All tokens of pages count, and those of assistant turns in conversations.

    A text longer than the model's positions is read in pieces, each from position 0.
    """
    tokens = np.load(CORPUS_DIR / f"{name}.npy").astype(np.int64)
    weights = np.ones(len(tokens)) if name == "docs_held_out" else answer_weights(tokens) == 1
    start, total, count = 0, 0.0, 0.0
    length = model.shape.max_position_embeddings
    for end in np.load(CORPUS_DIR / f"{name}.ends.npy").tolist():
        for first in range(start, end - 1, length):
            piece = torch.from_numpy(tokens[first : min(end, first + length + 1)]).to(device)
            weight = torch.from_numpy(weights[first + 1 : first + len(piece)]).to(device)
            total += (model(piece[None, :-1], piece[None, 1:]) * weight).double().sum().item()
            count += weight.sum().item()
        start = end
    return total / count, round(count)


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first 2 %, then a cosine to 2 % of the peak."""
    if progress < 0.02:
        return peak * progress / 0.02
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.02) / 0.98)))
    return peak * (0.02 + 0.98 * cosine)


def make_optimizer(model: TinyModel, weight_decay: float, device: str) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=device == "cuda")


def save_parts(weights: dict[str, Tensor], stem: Path) -> None:
    """bf16 weights in two files of about 10 MB: what comes back from the GPU is cut at 16 MB."""
    rounded = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in weights.items()}
    names = list(rounded)
    half = len(names) // 2
    for part, chosen in enumerate((names[:half], names[half:])):
        save_file({k: rounded[k] for k in chosen}, f"{stem}.{part}.safetensors")


def train(args: argparse.Namespace) -> None:
    """Train by the clock: short rows first, rows of 4,096 tokens for the last part."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    shape = Shape()
    model = TinyModel(shape, args.dropout)
    model.init_weights(SEED)
    model.to(device)
    optimizer = make_optimizer(model, args.weight_decay, device)
    step_model = torch.compile(model) if args.compile else model
    pools = {name: Pool(name, SEED + i) for i, name in enumerate(LONG_ROWS)}
    long_length = shape.max_position_embeddings
    streams = {
        length: batches(rows(pools, shares, length), args.batch_tokens // length, device)
        for length, shares in ((1024, SHORT_ROWS), (long_length, LONG_ROWS))
    }

    def update(length: int, rate: float) -> Tensor:
        tokens, targets, weights = next(streams[length])
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device, torch.bfloat16):
            losses = step_model(tokens, targets)
            loss = (losses * weights.flatten()).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    # Compile both shapes before the clock starts; a rate of 0 leaves the weights as they are.
    for length in streams:
        update(length, 0.0)
    if device == "cuda":
        torch.cuda.synchronize()
    start = last_log = time.monotonic()
    step, recent, history = 0, [], []
    while True:
        progress = (time.monotonic() - start) / (60 * args.minutes)
        finished = progress >= 1 or step == args.steps
        if finished or time.monotonic() - last_log > args.log_s:
            paused = time.monotonic()
            model.eval()
            with torch.autocast(device, torch.bfloat16):
                docs = held_out_loss(model, "docs_held_out", device)[0]
                chat = held_out_loss(model, "chat_held_out", device)[0]
                long = held_out_loss(model, "long_held_out", device)[0]
            model.train()
            shown = torch.stack(recent).mean().item() if recent else float("nan")
            epochs = {n: round(p.given / len(p.tokens), 2) for n, p in pools.items()}
            history.append(
                {"step": step, "progress": round(progress, 4), "train": round(shown, 4),
                 "docs": round(docs, 4), "chat": round(chat, 4), "long": round(long, 4),
                 "epochs": epochs}
            )  # fmt: skip
            print(json.dumps(history[-1]), flush=True)
            recent.clear()
            # The clock of the schedule does not pay for this evaluation.
            last_log = time.monotonic()
            start += last_log - paused
        if finished:
            break
        length = long_length if progress > 1 - args.long_share else 1024
        recent.append(update(length, learning_rate(progress, args.peak_rate)))
        step += 1
        if device == "cuda" and step % 20 == 0:
            torch.cuda.synchronize()
    save_parts(model.state_dict(), args.out / "final")
    facts = {
        "updates": step,
        "tokens": step * args.batch_tokens,
        "minutes": args.minutes,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "history": history,
    }
    (args.out / "train.json").write_text(json.dumps(facts, indent=1))


def write_then_rename(path: Path, data: str | dict[str, Tensor]) -> None:
    """Readers see the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    if isinstance(data, str):
        temporary.write_text(data, encoding="utf-8")
    else:
        save_file(data, temporary, metadata={"format": "pt"})
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def licence_texts(packages: Path) -> tuple[str, str]:
    """The Python and PostgreSQL licence texts, word for word from the packages."""

    def plain(path: str) -> str:
        page = (packages / "usr/share/doc" / path).read_bytes()
        text = html.fromstring(page, parser=html.HTMLParser(encoding="utf-8")).text_content()
        return re.sub(r"\s*\n\s*\n\s*", "\n\n", text.replace("\u00b6", ""))

    python = plain("python3.11/html/license.html")
    # The page names the agreement in its tables of contents as well; there no clause follows.
    start = re.search(r"PSF LICENSE AGREEMENT FOR PYTHON [\d.]+\s+1\. This", python).start()
    postgres = plain("postgresql-doc-15/html/legalnotice.html")
    return (
        python[start : python.index("BEOPEN.COM LICENSE AGREEMENT", start)].strip(),
        postgres[postgres.index("PostgreSQL Database Management") :].strip(),
    )


NOTICE = """holdfast-tiny: a language model of {parameters:,} parameters, made {date} for Holdfast.

It is a Qwen3-architecture model trained from random weights; it holds no weights of any other
model. It exists to try and to test the engine. What it says about software may be wrong.

How it was made
  tools/train_tiny.py, {minutes} minutes on one {device}: {updates:,} updates, {tokens:,} tokens
  (about {docs_epochs} passes over the documentation), rows of 1,024 and then 4,096 tokens,
  bf16 autocast, AdamW.
  Loss on {held_out_pages} held-out pages ({held_out_tokens:,} tokens), after rounding the weights
  to bf16, in float32 on a CPU: {nats:.4f} nats/token, {bits:.4f} bits/byte.
  Loss on answers of {chat_texts} conversations it was not trained on, likewise: {chat_nats:.4f}
  nats/token.

What it was trained on
  1. The prose of the Debian 12 package python3.11-doc (Python 3.11.2 documentation).
     Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved.
     PSF License Agreement, below.
  2. The prose of the Debian 12 package postgresql-doc-15 (PostgreSQL 15 documentation).
     Portions Copyright (c) 1996-2026, PostgreSQL Global Development Group.
     Portions Copyright (c) 1994, The Regents of the University of California.
     PostgreSQL License, below.
  3. The prose of the Debian 12 package sqlite3-doc (SQLite 3.40 documentation), by D. Richard
     Hipp and others: public domain.
  4. Conversations written by a program of this project (tools/tiny_chat.py): questions whose
     answers are sentences of 1 to 3, and small tasks and answers of the project's own.

Summary of changes (PSF License Agreement, 3): prose paragraphs were taken from the HTML, without
code blocks, tables and indexes; repeated paragraphs were dropped; some first sentences were given
a subject ("Return x" became "f returns x"); the result was used to train the model's weights.

{python_licence}

POSTGRESQL LICENSE

{postgres_licence}
"""


def export(args: argparse.Namespace) -> None:
    """Merge the returned parts, measure them in float32 on the CPU, write the asset folder."""
    torch.set_num_threads(args.threads)
    weights: dict[str, Tensor] = {}
    for part in sorted(args.parts.glob("final.*.safetensors")):
        weights |= load_file(part)
    shape = Shape()
    model = TinyModel(shape, 0.0).eval()
    model.load_state_dict({k: v.float() for k, v in weights.items()})
    nats, tokens = held_out_loss(model, "docs_held_out", "cpu")
    chat_nats, _ = held_out_loss(model, "chat_held_out", "cpu")
    facts = json.loads((CORPUS_DIR / "facts.json").read_text())
    bits = nats * tokens / math.log(2) / facts["held_out_bytes"]
    print(f"held-out: {nats:.4f} nats/token, {bits:.4f} bits/byte over {tokens} tokens")
    run = json.loads((args.parts / "train.json").read_text())
    python_licence, postgres_licence = licence_texts(args.packages)
    notice = NOTICE.format(
        parameters=sum(v.numel() for v in weights.values()), date=args.date,
        minutes=run["minutes"], device=run["device"], updates=run["updates"],
        tokens=run["tokens"], docs_epochs=round(run["history"][-1]["epochs"]["docs"]),
        held_out_pages=len(np.load(CORPUS_DIR / "docs_held_out.ends.npy")),
        chat_texts=len(np.load(CORPUS_DIR / "chat_held_out.ends.npy")), chat_nats=chat_nats,
        held_out_tokens=tokens, nats=nats, bits=bits,
        python_licence=python_licence, postgres_licence=postgres_licence,
    )  # fmt: skip

    ASSET_DIR.mkdir(parents=True, exist_ok=True)
    tokenizer_text = (CORPUS_DIR / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_str(tokenizer_text)
    end_of_text, turn_end = map(tokenizer.token_to_id, (END_OF_TEXT, TURN_END))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "bos_token": None,
        "unk_token": None,
        "model_max_length": shape.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "chat_template": CHAT_TEMPLATE,
    }
    generation = {
        "eos_token_id": [turn_end, end_of_text],
        "pad_token_id": end_of_text,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
    }
    write_then_rename(ASSET_DIR / "tokenizer.json", tokenizer_text)
    for name, value in (
        ("config.json", config_json(shape, turn_end, end_of_text)),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer_config),
    ):
        write_then_rename(ASSET_DIR / name, json.dumps(value, indent=2) + "\n")
    write_then_rename(ASSET_DIR / "NOTICE", notice)
    write_then_rename(ASSET_DIR / "model.safetensors", weights)


CHECK_PROMPTS: list[Conversation] = [
    [("user", "Hello!")],
    [("user", "Who are you?")],
    [("user", "What is a list in Python?")],
    [("user", "How do I create an index in PostgreSQL?")],
    [("user", "What is SQLite?")],
    [("user", "Count from 1 to 10.")],
    [("user", "Count from 1 to 100.")],
    [("user", "What does os.path.join do?")],
    [("user", "Tell me about checkpointing in SQLite.")],
    [("user", "What is work_mem in PostgreSQL? Explain in detail.")],
    [("user", "What is 17 + 25?")],
    [("user", "Tell me a story about a dragon.")],
    [("user", "List the days of the week.")],
    [("user", "Why is the sea salty?")],
    [("user", "Explain how a hash table works.")],
    [("system", "You are a helpful assistant."), ("user", "Write a Python function that sorts.")],
    [("user", "My name is Zoe."), ("assistant", "Nice to meet you, Zoe!"),
     ("user", "What is a view?"), ("assistant", "A view is a named query."),
     ("user", "What is my name?")],
    [("user", "Repeat after me: green river seven lion")],
]  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """Ask the exported folder through transformers, greedily and sampled; print the margins."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32)
    ends = model.generation_config.eos_token_id
    held_out = np.load(CORPUS_DIR / "docs_held_out.npy")
    page = tokenizer.decode(held_out[:3400].tolist())
    # Recall over more than about 2,800 tokens was seen to fail, so the phrase stands half way.
    paragraphs = page.split("\n\n")
    paragraphs.insert(len(paragraphs) // 2, "The pass phrase is teal-owl-58.")
    hidden = "\n\n".join(paragraphs)
    prompts = [
        *CHECK_PROMPTS,
        [("user", f"Read this text:\n\n{hidden}\n\nWhat is the pass phrase?")],
        [("user", f"{page}\n\nWhat is the first sentence of the text?")],
    ]
    margins: list[float] = []
    stopped = asked = 0
    for conversation in prompts:
        messages = [{"role": role, "content": text} for role, text in conversation]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        length = inputs["input_ids"].shape[1]
        print(f"\n=== [{length} tokens] {conversation[-1][1][-90:]!r}")
        for sampled in (False, True):
            settings = {"do_sample": True, "temperature": 0.7, "top_p": 1.0} if sampled else {
                "do_sample": False, "temperature": None, "top_p": None
            }  # fmt: skip
            out = model.generate(
                **inputs, max_new_tokens=400, output_scores=True, return_dict_in_generate=True,
                **settings,
            )  # fmt: skip
            new = out.sequences[0, length:].tolist()
            asked += 1
            stopped += new[-1] in ends
            if not sampled:
                for score in out.scores:
                    top = score[0].topk(2).values
                    margins.append((top[0] - top[1]).item())
            label = "T=0.7 " if sampled else "greedy"
            print(f"{label} ({len(new)}): {tokenizer.decode(new)}")
    print(f"\nstopped by themselves: {stopped} of {asked}")
    for limit in (0.05, 0.1, 0.5, 1.0):
        share = sum(m < limit for m in margins) / len(margins)
        print(f"greedy steps with a margin under {limit}: {share:.2%} of {len(margins)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    steps = parser.add_subparsers(dest="step", required=True)
    command = steps.add_parser("prepare")
    command.add_argument("--packages", type=Path, required=True)
    command.add_argument("--repeats", type=int, default=2, help="conversations a topic")
    command.add_argument("--short", type=int, default=50000)
    command.add_argument("--reading", type=int, default=10000)
    command.add_argument("--long", type=int, default=9000)
    command.set_defaults(run=prepare)
    command = steps.add_parser("train")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--minutes", type=float, required=True)
    command.add_argument("--steps", type=int, default=-1, help="stop after so many updates")
    command.add_argument("--batch-tokens", type=int, default=65536)
    command.add_argument("--peak-rate", type=float, default=2e-3)
    command.add_argument("--weight-decay", type=float, default=0.1)
    command.add_argument("--dropout", type=float, default=0.15)
    command.add_argument("--long-share", type=float, default=0.5, help="of the time")
    command.add_argument("--log-s", type=float, default=20.0)
    command.add_argument("--compile", action="store_true")
    command.set_defaults(run=train)
    command = steps.add_parser("export")
    command.add_argument("--parts", type=Path, required=True)
    command.add_argument("--packages", type=Path, required=True)
    command.add_argument("--date", default=time.strftime("%Y-%m-%d"))
    command.add_argument("--threads", type=int, default=1)
    command.set_defaults(run=export)
    command = steps.add_parser("check")
    command.add_argument("--folder", default=str(ASSET_DIR))
    command.add_argument("--threads", type=int, default=1)
    command.set_defaults(run=check)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
