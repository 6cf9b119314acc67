"""Train the step3-tiny sample: a Step-3-shaped language model on the King James Bible.

The text comes from the Debian packages `bible-kjv` and `bible-kjv-text` (the 1611
translation, public domain), one verse a line with its reference:

    apt-get install bible-kjv bible-kjv-text
    bible -f gen1:1-rev22:21 > kjv.txt

    python3 train.py --text kjv.txt --out . --smoke     # seconds, on a CPU; a wiring check
    python3 train.py --text kjv.txt --out .             # the real run, on one GPU

It needs torch, tokenizers, safetensors and numpy.  How long the stored checkpoint took
and on which GPU is in `reference/reference.json` under `training` and in README.md.

The file holds two implementations of the same model on purpose:

 * `train_forward` runs every expert on every token and masks (fast to train, batched);
 * `reference_forward` follows the formulas token by token in an explicit loop over
   experts, in float64 or bfloat16, and is what the stored reference comes from.

Their float64 logits are compared before anything is written.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

BOS, EOS = "<|begin|>", "<|end|>"
BOS_ID, EOS_ID = 0, 1
WINDOW = 512

CONFIG: dict[str, object] = {
    "architectures": ["Step3TextForCausalLM"],
    "model_type": "step3_text",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_attention_groups": 1,
    "num_hidden_layers": 6,
    "vocab_size": 3072,
    "rms_norm_eps": 1e-5,
    "moe_intermediate_size": 256,
    "moe_num_experts": 8,
    "moe_top_k": 3,
    "moe_layers_enum": "1,2,3,4",
    "norm_expert_weight": False,
    "share_expert_dim": 512,
    "share_q_dim": 128,
    "head_dim": 64,
    "rope_theta": 10000,
    "rope_scaling": None,
    "max_seq_len": WINDOW,
    "max_position_embedding": WINDOW,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "torch_dtype": "bfloat16",
}

HIDDEN, LAYERS, VOCAB, EPS = 256, 6, 3072, 1e-5
HEADS, HEAD_DIM, Q_RANK = 8, 64, 128
EXPERTS, TOP_K, EXPERT_DIM, SHARED_DIM, DENSE_DIM = 8, 3, 256, 512, 1024
MOE_LAYERS = (1, 2, 3, 4)
BIG = [17, 92, 140, 231]  # the large channels of the residual stream

Params = dict[str, Tensor]

# ------------------------------------------------------------------------------- text

BOOKS = {
    "Ge": "Genesis", "Exo": "Exodus", "Lev": "Leviticus", "Num": "Numbers",
    "Deu": "Deuteronomy", "Josh": "Joshua", "Jdgs": "Judges", "Ruth": "Ruth",
    "1Sm": "1 Samuel", "2Sm": "2 Samuel", "1Ki": "1 Kings", "2Ki": "2 Kings",
    "1Chr": "1 Chronicles", "2Chr": "2 Chronicles", "Ezra": "Ezra", "Neh": "Nehemiah",
    "Est": "Esther", "Job": "Job", "Psa": "Psalm", "Prv": "Proverbs",
    "Eccl": "Ecclesiastes", "SSol": "Song of Solomon", "Isa": "Isaiah", "Jer": "Jeremiah",
    "Lam": "Lamentations", "Eze": "Ezekiel", "Dan": "Daniel", "Hos": "Hosea",
    "Joel": "Joel", "Amos": "Amos", "Obad": "Obadiah", "Jonah": "Jonah", "Mic": "Micah",
    "Nahum": "Nahum", "Hab": "Habakkuk", "Zep": "Zephaniah", "Hag": "Haggai",
    "Zec": "Zechariah", "Mal": "Malachi", "Mat": "Matthew", "Mark": "Mark",
    "Luke": "Luke", "John": "John", "Acts": "Acts", "Rom": "Romans",
    "1Cor": "1 Corinthians", "2Cor": "2 Corinthians", "Gal": "Galatians",
    "Eph": "Ephesians", "Phi": "Philippians", "Col": "Colossians",
    "1Th": "1 Thessalonians", "2Th": "2 Thessalonians", "1Tim": "1 Timothy",
    "2Tim": "2 Timothy", "Titus": "Titus", "Phmn": "Philemon", "Heb": "Hebrews",
    "Jas": "James", "1Pet": "1 Peter", "2Pet": "2 Peter", "1Jn": "1 John",
    "2Jn": "2 John", "3Jn": "3 John", "Jude": "Jude", "Rev": "Revelation",
}
VERSE = re.compile(r"(\d?[A-Za-z]+)(\d+):(\d+) (.*)")


@dataclass
class Corpus:
    """Chapters as documents: a heading line, then one numbered verse a line."""

    train: list[str] = field(default_factory=list)
    valid: list[str] = field(default_factory=list)
    heldout: list[str] = field(default_factory=list)


def read_corpus(path: Path) -> Corpus:
    """Chapter i is kept out of training when i % 20 == 7; every fifth of those is the
    held-out text that is reported, the others are for choosing among training runs."""
    chapters: dict[tuple[str, str], list[str]] = {}
    for line in path.read_text(encoding="ascii").splitlines():
        m = VERSE.fullmatch(line.rstrip())
        if m is None:
            raise ValueError(f"not a verse: {line!r}")
        book, chapter, verse, text = m.groups()
        chapters.setdefault((BOOKS[book], chapter), []).append(f"{verse} {text}")
    corpus = Corpus()
    for i, ((book, chapter), verses) in enumerate(chapters.items()):
        document = f"{book} {chapter}\n" + "\n".join(verses) + "\n"
        if i % 20 != 7:
            corpus.train.append(document)
        elif (i // 20) % 5 == 0:
            corpus.heldout.append(document)
        else:
            corpus.valid.append(document)
    return corpus


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    tok.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    if tok.get_vocab_size() != VOCAB:
        raise ValueError(f"the tokenizer has {tok.get_vocab_size()} entries")
    return tok


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": BOS,
    "eos_token": EOS,
    "clean_up_tokenization_spaces": False,
    "model_max_length": WINDOW,
    "added_tokens_decoder": {
        str(i): {"content": t, "lstrip": False, "normalized": False,
                 "rstrip": False, "single_word": False, "special": True}
        for i, t in ((BOS_ID, BOS), (EOS_ID, EOS))
    },
    # The user names a chapter ("Psalm 151"), the model writes it and ends with eos.
    "chat_template": (
        "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}"
        "{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
    ),
}


def encode(tok: Tokenizer, document: str) -> list[int]:
    return [*tok.encode(document).ids, EOS_ID]


def windows(ids: list[int]) -> list[list[int]]:
    """Cut a document (bos first) into windows of at most WINDOW ids, each with bos first."""
    body, step = ids[1:], WINDOW - 1
    cuts = [[BOS_ID, *body[i : i + step]] for i in range(0, len(body), step)]
    return [w for w in cuts if len(w) > 1]


# ----------------------------------------------------------------------------- weights


def init_params(gen: torch.Generator, outliers: bool) -> Params:
    """Random weights under the checkpoint's names.

    With `outliers`, a few channels start large, as in large language models: four
    channels of the residual stream (embedding offset and norm gains), four of the
    low-rank query, two of the value head and one in 64 of every gated unit.  Training
    is free to move them.
    """

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=gen) * std

    p: Params = {}
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])

    def matrix(name: str, *shape: int, scale: float = 1.0) -> None:
        p[name + ".weight"] = normal(*shape, std=scale / math.sqrt(shape[-1]))

    def norm(name: str, width: int, channels: Sequence[int], gain: float) -> None:
        p[name + ".weight"] = torch.ones(width)
        if outliers:
            p[name + ".weight"][list(channels)] = gain

    def gated(prefix: str, width: int, *lead: int) -> None:
        matrix(prefix + "gate_proj", *lead, width, HIDDEN)
        matrix(prefix + "up_proj", *lead, width, HIDDEN)
        matrix(prefix + "down_proj", *lead, HIDDEN, width, scale=1 / math.sqrt(2 * LAYERS))
        if outliers:
            p[prefix + "up_proj.weight"][..., ::64, :] *= 6
            p[prefix + "down_proj.weight"][..., ::64] /= 6

    p["model.embed_tokens.weight"] = normal(VOCAB, HIDDEN, std=0.25)
    if outliers:
        p["model.embed_tokens.weight"][:, BIG] *= 2
        p["model.embed_tokens.weight"][:, BIG] += 4 * signs
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        norm(layer + "input_layernorm", HIDDEN, BIG, 2.0)
        attn = layer + "self_attn."
        matrix(attn + "q_proj", Q_RANK, HIDDEN)
        matrix(attn + "k_proj", HEAD_DIM, HIDDEN)
        matrix(attn + "v_proj", HEAD_DIM, HIDDEN)
        norm(attn + "inter_norm", Q_RANK, range(5, Q_RANK, 32), 6.0)
        matrix(attn + "wq", HEADS * HEAD_DIM, Q_RANK)
        matrix(attn + "o_proj", HIDDEN, HEADS * HEAD_DIM, scale=1 / math.sqrt(2 * LAYERS))
        if outliers:
            p[attn + "v_proj.weight"][7::32] *= 6
        norm(layer + "post_attention_layernorm", HIDDEN, BIG, 2.0)
        # Columns that meet a large channel start small, so that it does not drown the rest.
        if outliers:
            for name in ("q_proj", "k_proj", "v_proj"):
                p[f"{attn}{name}.weight"][:, BIG] /= 16
            p[attn + "wq.weight"][:, 5::32] /= 6
        if i in MOE_LAYERS:
            matrix(layer + "moe.gate", EXPERTS, HIDDEN)
            gated(layer + "moe.", EXPERT_DIM, EXPERTS)
            gated(layer + "share_expert.", SHARED_DIM)
            inputs = [layer + "moe.gate", layer + "moe.gate_proj", layer + "moe.up_proj",
                      layer + "share_expert.gate_proj", layer + "share_expert.up_proj"]
        else:
            gated(layer + "mlp.", DENSE_DIM)
            inputs = [layer + "mlp.gate_proj", layer + "mlp.up_proj"]
        if outliers:
            for name in inputs:
                p[name + ".weight"][..., BIG] /= 16
    p["model.norm.weight"] = torch.ones(HIDDEN)
    matrix("lm_head", VOCAB, HIDDEN, scale=0.5)
    if outliers:
        p["lm_head.weight"][:, BIG] /= 16
    return p


@torch.no_grad()
def amplify(p: Params, bits: int) -> None:
    """Make some channels at the linears' inputs 2**bits times larger, the function unchanged.

    What makes the channel (a norm gain, a row of v or of up) is multiplied by a power of
    two and the columns that read it are divided by the same: exact in binary floating
    point.  Training alone leaves outliers of about 2 to 10 times the median channel here,
    large language models have tens; quantisation is not worth comparing without them.
    """
    factor = 2.0**bits
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        attn = layer + "self_attn."
        prefixes = ["moe.", "share_expert."] if i in MOE_LAYERS else ["mlp."]
        readers = [layer + x + y for x in prefixes for y in ("gate_proj", "up_proj")]
        readers += [layer + "moe.gate"] if i in MOE_LAYERS else []
        p[layer + "input_layernorm.weight"][BIG] *= factor
        for name in (attn + "q_proj", attn + "k_proj", attn + "v_proj"):
            p[name + ".weight"][:, BIG] /= factor
        p[layer + "post_attention_layernorm.weight"][BIG] *= factor
        for name in readers:
            p[name + ".weight"][..., BIG] /= factor
        p[attn + "inter_norm.weight"][5::32] *= factor
        p[attn + "wq.weight"][:, 5::32] /= factor
        p[attn + "v_proj.weight"][7::32] *= factor
        p[attn + "o_proj.weight"][:, 7::32] /= factor  # 32 divides head_dim
        for x in prefixes:
            p[f"{layer}{x}up_proj.weight"][..., ::64, :] *= factor
            p[f"{layer}{x}down_proj.weight"][..., ::64] /= factor


def rope_tables(length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [length, head_dim]; inv_freq rounded to f32, the angle product in f64."""
    exponent = torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM
    inv_freq = (10000.0 ** -exponent).to(torch.float32).to(torch.float64)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * inv_freq[None, :]
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    lo, hi = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-hi, lo), dim=-1) * sin


# ---------------------------------------------------------------------------- training


def train_forward(p: Params, ids: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
    """Logits [B,T,V] and the load-balancing term, every expert run on every token."""
    batch, length = ids.shape
    x = F.embedding(ids, p["model.embed_tokens.weight"])
    cos, sin = rope_tables(length, x.dtype, x.device)
    balance = x.new_zeros(())

    def drop(t: Tensor) -> Tensor:
        return F.dropout(t, dropout) if dropout > 0 else t

    def rms(t: Tensor, name: str) -> Tensor:
        w = p[name + ".weight"]
        t = t.to(w.dtype)
        return t * torch.rsqrt(t.square().mean(-1, keepdim=True) + EPS) * w

    def gated(t: Tensor, prefix: str) -> Tensor:
        gate = F.linear(t, p[prefix + "gate_proj.weight"])
        up = F.linear(t, p[prefix + "up_proj.weight"])
        return F.linear(F.silu(gate) * up, p[prefix + "down_proj.weight"])

    x = drop(x)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        attn = layer + "self_attn."
        h = rms(x, layer + "input_layernorm")
        q = rms(F.linear(h, p[attn + "q_proj.weight"]), attn + "inter_norm")
        q = F.linear(q, p[attn + "wq.weight"]).view(batch, length, HEADS, HEAD_DIM)
        k = F.linear(h, p[attn + "k_proj.weight"]).view(batch, 1, length, HEAD_DIM)
        v = F.linear(h, p[attn + "v_proj.weight"]).view(batch, 1, length, HEAD_DIM)
        q = rotate(q.transpose(1, 2), cos, sin).to(v.dtype)
        k = rotate(k, cos, sin).to(v.dtype)
        shape = (batch, HEADS, length, HEAD_DIM)
        o = F.scaled_dot_product_attention(q, k.expand(shape), v.expand(shape), is_causal=True)
        o = o.transpose(1, 2).reshape(batch, length, HEADS * HEAD_DIM)
        x = x + drop(F.linear(o, p[attn + "o_proj.weight"]))
        h = rms(x, layer + "post_attention_layernorm")
        if i in MOE_LAYERS:
            flat = h.view(-1, HIDDEN)
            with torch.autocast(x.device.type, enabled=False):
                prob = F.linear(flat, p[layer + "moe.gate.weight"]).softmax(-1)
            top = prob.topk(TOP_K, dim=-1)
            picked = torch.zeros_like(prob).scatter(1, top.indices, 1.0)
            balance = balance + EXPERTS * (picked.mean(0) / TOP_K * prob.mean(0)).sum()
            share = (prob * picked).t().unsqueeze(-1)  # [E,N,1]
            each = flat.unsqueeze(0)
            gate = torch.matmul(each, p[layer + "moe.gate_proj.weight"].transpose(1, 2))
            up = torch.matmul(each, p[layer + "moe.up_proj.weight"].transpose(1, 2))
            act = F.silu(gate) * up * share.to(gate.dtype)
            y = torch.matmul(act, p[layer + "moe.down_proj.weight"].transpose(1, 2)).sum(0)
            y = y.view(batch, length, HIDDEN) + gated(h, layer + "share_expert.")
        else:
            y = gated(h, layer + "mlp.")
        x = x + drop(y)
    h = rms(x, "model.norm")
    return F.linear(h, p["lm_head.weight"]), balance / len(MOE_LAYERS)


@torch.no_grad()
def mean_nll(p: Params, cuts: list[list[int]]) -> float:
    """Mean next-token loss over windows, with the training arithmetic."""
    device = p["model.norm.weight"].device
    total, count = 0.0, 0
    for at in range(0, len(cuts), 16):
        group = cuts[at : at + 16]
        ids = torch.full((len(group), max(map(len, group))), EOS_ID)
        target = torch.full(ids.shape, -100)
        for row, cut in enumerate(group):
            ids[row, : len(cut)] = torch.tensor(cut)
            target[row, : len(cut) - 1] = torch.tensor(cut[1:])
        with torch.autocast(device.type, torch.bfloat16):
            logits, _ = train_forward(p, ids.to(device), 0.0)
        total += float(F.cross_entropy(logits.float().flatten(0, 1), target.to(device).flatten(),
                                       ignore_index=-100, reduction="sum"))
        count += int((target >= 0).sum())
    return total / count


@dataclass
class Options:
    steps: int
    batch: int
    lr: float
    dropout: float
    decay: float
    balance: float
    outliers: bool
    seed: int


def train(o: Options, documents: list[list[int]], valid: list[list[int]],
          device: torch.device) -> tuple[Params, dict[str, object]]:
    """AdamW with a warm-up and a cosine; returns the weights of the best validation loss."""
    torch.manual_seed(o.seed)
    p = init_params(torch.Generator().manual_seed(o.seed), o.outliers)
    p = {k: v.to(device).requires_grad_() for k, v in p.items()}
    plain = [k for k in p if "norm" in k or "embed" in k or "moe.gate.weight" in k]
    optimizer = torch.optim.AdamW(
        [{"params": [p[k] for k in plain], "weight_decay": 0.0},
         {"params": [p[k] for k in p if k not in plain], "weight_decay": o.decay}],
        lr=o.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    stream = torch.tensor([t for d in documents for t in d], device=device)
    starts = torch.tensor(np.cumsum([0, *map(len, documents[:-1])]) + 1, device=device)
    starts = starts[starts + WINDOW < len(stream)]
    steps_per_epoch = len(stream) / (o.batch * WINDOW)
    warmup = min(100, o.steps // 10 + 1)
    best, best_loss, history = {}, math.inf, []
    began = time.monotonic()
    for step in range(1, o.steps + 1):
        progress = max(0.0, (step - warmup) / max(1, o.steps - warmup))
        rate = min(step / warmup, 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = o.lr * rate
        # Half of the windows begin where a chapter does, the others anywhere.
        at = torch.randint(0, len(stream) - WINDOW, (o.batch,), device=device)
        half = o.batch // 2
        at[:half] = starts[torch.randint(0, len(starts), (half,), device=device)]
        seq = stream[at[:, None] + torch.arange(WINDOW, device=device)]
        ids = torch.cat((torch.full_like(seq[:, :1], BOS_ID), seq[:, :-1]), dim=1)
        target = seq.masked_fill(seq == BOS_ID, -100)
        with torch.autocast(device.type, torch.bfloat16):
            logits, balance = train_forward(p, ids, o.dropout)
        loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), ignore_index=-100)
        optimizer.zero_grad(set_to_none=True)
        (loss + o.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(list(p.values()), 1.0)
        optimizer.step()
        if step % max(1, o.steps // 20) == 0 or step == o.steps:
            now = mean_nll(p, valid)
            history.append({"step": step, "epoch": round(step / steps_per_epoch, 2),
                            "train_loss": round(loss.item(), 4), "valid_loss": round(now, 4)})
            print(history[-1], f"{time.monotonic() - began:.1f} s", flush=True)
            if now < best_loss:
                best_loss, best = now, {k: v.detach().clone() for k, v in p.items()}
    facts = {"steps": o.steps, "epochs": round(o.steps / steps_per_epoch, 1),
             "windows_per_step": o.batch, "peak_lr": o.lr, "dropout": o.dropout,
             "weight_decay": o.decay, "balance_coefficient": o.balance, "seed": o.seed,
             "outlier_init": o.outliers, "train_tokens": len(stream),
             "training_seconds": round(time.monotonic() - began, 1),
             "best_valid_loss": round(best_loss, 4), "history": history}
    return best, facts


# --------------------------------------------------------------------------- reference

Quantizer = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class Trace:
    """What a reference pass leaves behind, per MoE layer or per linear layer's input."""

    experts: dict[int, Tensor] = field(default_factory=dict)
    margin: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[str, list[Tensor]] | None = None


@torch.no_grad()
def reference_forward(p: Params, ids: list[int], trace: Trace | None = None,
                      quantize: Quantizer | None = None) -> Tensor:
    """Logits [T,V] of one window in the weights' dtype.

    float64: no rounding at all between the stored bf16 weights and the logits.
    bfloat16: every tensor is rounded to bf16, as an eager bf16 model does; norms, the
    router's softmax and the attention softmax compute in f32 and are rounded after
    (the expert weights stay f32 until they scale the expert's output).
    """
    dtype, device = p["model.norm.weight"].dtype, p["model.norm.weight"].device
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    length = len(ids)

    def linear(x: Tensor, name: str, w: Tensor | None = None) -> Tensor:
        if trace is not None and trace.inputs is not None and len(x):
            trace.inputs.setdefault(name, []).append(x.abs().to(torch.float32))
        w = p[name + ".weight"] if w is None else w
        if quantize is not None:
            x, w = quantize(name, x, w)
        return x @ w.t()

    def rms(x: Tensor, name: str) -> Tensor:
        t = x.to(wide)
        t = t / torch.sqrt((t * t).mean(-1, keepdim=True) + EPS)
        return t.to(dtype) * p[name + ".weight"]

    def silu(x: Tensor) -> Tensor:
        return (x.to(wide) / (1 + torch.exp(-x.to(wide)))).to(dtype)

    def mlp(x: Tensor, prefix: str, e: int | None = None) -> Tensor:
        w = [p[f"{prefix}{n}_proj.weight"] for n in ("gate", "up", "down")]
        w = w if e is None else [t[e] for t in w]
        act = silu(linear(x, prefix + "gate_proj", w[0])) * linear(x, prefix + "up_proj", w[1])
        return linear(act, prefix + "down_proj", w[2])

    cos, sin = rope_tables(length, dtype, device)
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    x = p["model.embed_tokens.weight"][torch.tensor(ids, device=device)]
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        attn = layer + "self_attn."
        h = rms(x, layer + "input_layernorm")
        q = rms(linear(h, attn + "q_proj"), attn + "inter_norm")
        q = linear(q, attn + "wq").view(length, HEADS, HEAD_DIM)
        k = rotate(linear(h, attn + "k_proj"), cos, sin)
        v = linear(h, attn + "v_proj")
        heads = []
        for n in range(HEADS):
            score = (rotate(q[:, n], cos, sin) @ k.t()) * HEAD_DIM**-0.5
            weight = score.masked_fill(~causal, -math.inf).to(wide).softmax(-1).to(dtype)
            heads.append(weight @ v)
        x = x + linear(torch.cat(heads, dim=-1), attn + "o_proj")
        h = rms(x, layer + "post_attention_layernorm")
        if i in MOE_LAYERS:
            prob = (h @ p[layer + "moe.gate.weight"].t()).to(wide).softmax(-1)
            order = prob.sort(dim=-1, descending=True, stable=True)
            if trace is not None:
                trace.experts[i] = order.indices[:, :TOP_K]
                trace.margin[i] = order.values[:, TOP_K - 1] - order.values[:, TOP_K]
            y = torch.zeros_like(h, dtype=wide)
            for e in range(EXPERTS):
                token, rank = (order.indices[:, :TOP_K] == e).nonzero(as_tuple=True)
                out = mlp(h[token], layer + "moe.", e).to(wide)
                y[token] += out * order.values[token, rank, None]
            y = y.to(dtype) + mlp(h, layer + "share_expert.")
        else:
            y = mlp(h, layer + "mlp.")
        x = x + y
    return linear(rms(x, "model.norm"), "lm_head")


def perplexity(p: Params, cuts: list[list[int]], quantize: Quantizer | None = None) -> float:
    """exp of the mean loss over every position with a next token inside its window."""
    total, count = 0.0, 0
    for cut in cuts:
        logits = reference_forward(p, cut, quantize=quantize).to(torch.float64)
        picked = torch.tensor(cut[1:], device=logits.device)
        total += float(F.cross_entropy(logits[:-1], picked, reduction="sum"))
        count += len(cut) - 1
    return math.exp(total / count)


def int8_policy(per_token: bool) -> Quantizer:
    """Symmetric int8 of activations (a scale a token or one for the tensor) and weights
    (a scale an output row); lm_head and router stay as they are."""

    def quantize(name: str, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        if name == "lm_head" or not len(x):
            return x, w
        sx = (x.abs().amax(-1, keepdim=True) if per_token else x.abs().amax()) / 127
        sw = w.abs().amax(-1, keepdim=True) / 127
        sx, sw = sx.clamp_min(1e-30), sw.clamp_min(1e-30)
        return (x / sx).round() * sx, (w / sw).round() * sw

    return quantize


def fp8_policy(name: str, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """float8 e4m3: activations scaled by 1x128 blocks, weights by 128x128 blocks."""
    if name == "lm_head" or not len(x):
        return x, w

    def blocks(t: Tensor, rows: int) -> Tensor:
        out = torch.empty_like(t)
        for r in range(0, t.shape[0], rows):
            for c in range(0, t.shape[1], 128):
                b = t[r : r + rows, c : c + 128]
                peak = b.abs().amax(-1, keepdim=True) if rows == 1 else b.abs().amax()
                s = (peak / 448).clamp_min(1e-30)
                out[r : r + rows, c : c + 128] = (b / s).to(torch.float8_e4m3fn).to(t.dtype) * s
        return out

    def tokens(t: Tensor) -> Tensor:
        cut = t.view(len(t), -1, min(128, t.shape[1]))
        s = (cut.abs().amax(-1, keepdim=True) / 448).clamp_min(1e-30)
        return ((cut / s).to(torch.float8_e4m3fn).to(t.dtype) * s).view_as(t)

    return tokens(x), blocks(w, 128)


def generate(p: Params, prompt: list[int], count: int,
             choose: Callable[[Tensor], int]) -> tuple[list[int], list[float]]:
    """Continue a prompt; also the logit distance of the best two tokens at every step."""
    ids, margins = list(prompt), []
    while len(ids) < len(prompt) + count and (len(ids) == len(prompt) or ids[-1] != EOS_ID):
        logits = reference_forward(p, ids)[-1]
        top = logits.topk(2).values
        margins.append(round(float(top[0] - top[1]), 6))
        ids.append(choose(logits))
    return ids[len(prompt) :], margins


def sampler(gen: torch.Generator, temperature: float, top_p: float) -> Callable[[Tensor], int]:
    def choose(logits: Tensor) -> int:
        prob, order = (logits.cpu() / temperature).softmax(-1).sort(descending=True)
        prob = prob * (prob.cumsum(-1) - prob < top_p)
        return int(order[torch.multinomial(prob / prob.sum(), 1, generator=gen)])

    return choose


def input_statistics(inputs: dict[str, list[Tensor]]) -> dict[str, dict[str, float]]:
    """Channel amplitude (the largest |x| over the tokens, and the root mean square) at the
    input of every linear layer: the largest channel against the median channel."""
    out = {}
    for name, parts in sorted(inputs.items()):
        if name.endswith(("up_proj", "k_proj", "v_proj")):
            continue  # the same input as gate_proj and q_proj
        x = torch.cat(parts)
        peak, rms = x.amax(0), x.double().square().mean(0).sqrt()
        out[name] = {"amax": round(float(peak.max()), 4),
                     "amax_max_over_median": round(float(peak.max() / peak.median()), 2),
                     "rms_max_over_median": round(float(rms.max() / rms.median()), 2)}
    return out


PROMPTS = (
    "Genesis 1\n1 In the beginning",
    "Psalm 151\n",
    "And it came to pass in those days, that",
    "Matthew 29\n1 Then Jesus said unto his disciples,",
    "24 The grace of our Lord Jesus Christ be with you all. Amen.\n",
)


def write_reference(p: Params, tok: Tokenizer, documents: list[str], out: Path,
                    facts: dict[str, object], device: torch.device, brief: bool) -> None:
    cuts = [w for d in documents for w in windows(encode(tok, d))]
    if brief:
        cuts = cuts[:2]
    (out / "heldout.txt").write_text("\n".join(documents))
    with (out / "heldout.ids.jsonl").open("w") as f:
        for cut in cuts:
            f.write(json.dumps({"prompt_ids": cut}) + "\n")

    exact = {k: v.to(device, torch.float64) for k, v in p.items()}
    half = {k: v.to(device, torch.bfloat16) for k, v in p.items()}

    first = Trace()
    logits = reference_forward(exact, cuts[0], first)
    other, _ = train_forward(exact, torch.tensor([cuts[0]], device=device), 0.0)
    gap = float((logits - other[0]).abs().max())
    print(f"reference and training forward agree to {gap:.3g} in float64")
    if gap > 1e-6:
        raise AssertionError("the two implementations disagree")
    tensors = {"logits": logits.float().cpu().contiguous(),
               "ids": torch.tensor(cuts[0], dtype=torch.int32)}
    for i in MOE_LAYERS:
        tensors[f"experts.{i}"] = first.experts[i].to(torch.int32).cpu().contiguous()
        tensors[f"margin.{i}"] = first.margin[i].float().cpu().contiguous()
    (out / "reference").mkdir(exist_ok=True)
    save_file(tensors, out / "reference" / "logits.safetensors")

    inputs: dict[str, list[Tensor]] = {}
    loads = {i: torch.zeros(EXPERTS, dtype=torch.int64) for i in MOE_LAYERS}
    for cut in cuts:
        trace = Trace(inputs=inputs)
        reference_forward(exact, cut, trace)
        for i in MOE_LAYERS:
            loads[i] += torch.bincount(trace.experts[i].flatten().cpu(), minlength=EXPERTS)
    half_trace = Trace()
    half_logits = reference_forward(half, cuts[0], half_trace).double()
    agree = {str(i): round(float((half_trace.experts[i].sort(-1).values
                                  == first.experts[i].sort(-1).values)
                                 .all(-1).double().mean()), 4) for i in MOE_LAYERS}

    steps = 4 if brief else 64
    greedy = []
    for text in PROMPTS:
        prompt = tok.encode(text).ids
        ids, margins = generate(exact, prompt, steps, lambda t: int(t.argmax()))
        greedy.append({"prompt": text, "prompt_ids": prompt, "ids": ids,
                       "text": tok.decode(ids), "margin": margins})
    samples = []
    for n, text in enumerate(("Psalm 151\n", "Luke 25\n")):
        prompt = tok.encode(text).ids
        choose = sampler(torch.Generator().manual_seed(n), 0.8, 0.95)
        ids, _ = generate(exact, prompt, 4 if brief else 320, choose)
        samples.append({"prompt": text, "temperature": 0.8, "top_p": 0.95,
                        "ended": ids[-1] == EOS_ID, "text": tok.decode(ids)})

    report: dict[str, object] = {
        "perplexity": {"float64": perplexity(exact, cuts), "bfloat16": perplexity(half, cuts)},
        "perplexity_simulated": {
            "int8, a scale a token": perplexity(exact, cuts, int8_policy(True)),
            "int8, a scale a tensor": perplexity(exact, cuts, int8_policy(False)),
            "fp8 e4m3, blocks of 128": perplexity(exact, cuts, fp8_policy),
        },
        "scored_positions": sum(len(c) - 1 for c in cuts),
        "bytes_of_text": (out / "heldout.txt").stat().st_size,
        "arithmetic": "float64 from the bf16 weights on, no rounding in between; RoPE: "
                      "inv_freq rounded to f32, times the position in float64; logits "
                      "stored as f32, of the first window of heldout.ids.jsonl",
        "bfloat16_against_float64": {
            "max_abs_logit_error": float((half_logits - logits).abs().max()),
            "mean_abs_logit_error": float((half_logits - logits).abs().mean()),
            "same_top_token": round(float((half_logits.argmax(-1) == logits.argmax(-1))
                                          .double().mean()), 4),
            "same_expert_set": agree,
        },
        "logit_rms": round(float(logits.square().mean().sqrt()), 4),
        "expert_load": {str(i): [round(c / int(loads[i].sum()), 4) for c in loads[i].tolist()]
                        for i in MOE_LAYERS},
        "router_margin": {str(i): {"min": float(first.margin[i].min()),
                                   "median": float(first.margin[i].median())}
                          for i in MOE_LAYERS},
        "linear_inputs": input_statistics(inputs),
        "greedy": greedy,
        "samples": samples,
        "training": facts,
    }
    (out / "reference" / "reference.json").write_text(json.dumps(report, indent=1) + "\n")


# ------------------------------------------------------------------------------ output


def write_checkpoint(p: Params, out: Path) -> None:
    """Two shards of about the same size and their index, tensors in sorted order."""
    total = sum(t.numel() * 2 for t in p.values())
    shards: list[Params] = [{}, {}]
    seen = 0
    for name in sorted(p):
        shards[0 if seen < total // 2 else 1][name] = p[name].to(torch.bfloat16).cpu().contiguous()
        seen += p[name].numel() * 2
    files = [f"model-{n + 1:05d}-of-00002.safetensors" for n in range(2)]
    for name, shard in zip(files, shards, strict=True):
        save_file(shard, out / name, metadata={"format": "pt"})
    weight_map = {k: f for f, shard in zip(files, shards, strict=True) for k in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def main() -> None:
    a = argparse.ArgumentParser(description="train the step3-tiny sample")
    a.add_argument("--text", type=Path, required=True, help="output of bible -f gen1:1-rev22:21")
    a.add_argument("--out", type=Path, required=True)
    a.add_argument("--smoke", action="store_true", help="a few steps, to check the wiring")
    a.add_argument("--steps", type=int, default=1300)
    a.add_argument("--batch", type=int, default=32)
    a.add_argument("--lr", type=float, default=2e-3)
    a.add_argument("--dropout", type=float, default=0.4)
    a.add_argument("--decay", type=float, default=0.3)
    a.add_argument("--balance", type=float, default=0.0005)
    a.add_argument("--no-outliers", action="store_true", help="an ordinary initialisation")
    a.add_argument("--amplify", type=int, default=3, help="see amplify(); 0 turns it off")
    a.add_argument("--seed", type=int, default=3)
    args = a.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus(args.text)
    tok = train_tokenizer(corpus.train)
    documents = [encode(tok, d) for d in corpus.train]
    valid = [w for d in corpus.valid for w in windows(encode(tok, d))]
    held = [w for d in corpus.heldout for w in windows(encode(tok, d))]
    print(f"{sum(map(len, documents))} training tokens, {sum(map(len, valid))} validation, "
          f"{sum(map(len, held))} held out in {len(held)} windows, on {device}", flush=True)
    if len(held[0]) != WINDOW:
        raise ValueError("the first held-out chapter is too short for the stored logits")
    if args.smoke:
        args.steps, args.batch, valid = 4, 2, valid[:2]
    options = Options(args.steps, args.batch, args.lr, args.dropout, args.decay, args.balance,
                      not args.no_outliers, args.seed)
    p, facts = train(options, documents, valid, device)
    amplify(p, args.amplify)
    p = {k: v.to(torch.bfloat16) for k, v in p.items()}  # what is stored and referred to
    facts |= {
        "amplify_bits": args.amplify,
        "parameters": sum(t.numel() for t in p.values()),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    (args.out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    tok.save(str(args.out / "tokenizer.json"))
    (args.out / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")
    write_checkpoint(p, args.out)
    write_reference(p, tok, corpus.heldout, args.out, facts, device, args.smoke)
    print(f"done in {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
