"""Times what others make of the attention side of Step-3 on this GPU, beside what `step3-bench` measured of a bundle in the same run.

    peers.py --compile I/N       compiles a share of the Triton kernels, so that processes can do it together and measuring need not wait
    peers.py --ours DIR [--precision bf16] [--precision fp8] [--report FILE]
                                 measures, and prints one table: ours, the best peer, and how many percent of the roof each reaches

Peers: scaled_dot_product_attention of PyTorch with every back end, the 64 heads as rows of one head or as grouped heads; a flash-decode in
Triton, with the context split, over bf16 and fp8 keys and values (contiguous, which spares it the page table); cuBLAS for bf16;
`torch._scaled_mm` with scales for 1x128 and 128x128 blocks, and a block-scaled contraction in Triton with K split, for fp8. Triton's kernels are
tuned over tile sizes, stages and splits. Whatever is wrong by more than its format allows does not count. The layer is made of the best of each,
in one CUDA graph, with norms, rotation and quantisation in Triton.

Times are medians over replays of CUDA graphs whose inputs follow each other past the caches. The roof of a shape is the larger of its bytes at
the read rate and its operations at the peak that step3-bench measured in the same run.
"""
import argparse
import json
import math
import os
import statistics
import sys
import warnings

import torch
import triton
import triton.language as tl

warnings.filterwarnings("ignore")
HEADS, DIM, HIDDEN, RANK, EPSILON, THETA = 64, 256, 7168, 2048, 1e-5, 500000.0
WIDE = HEADS * DIM
shapes = {"q_down, k, v": (RANK + 2 * DIM, HIDDEN), "q_up": (WIDE, RANK), "o_proj": (HIDDEN, WIDE)}
attention_shapes = [(16, 4096), (64, 4096), (128, 4096), (256, 4096), (64, 32768), (128, 32768)]
gemm_rows = (64, 128, 256)
layer_shape = (64, 8192)
cached = 150 << 20  # bytes that no cache holds
e4m3 = torch.float8_e4m3fn


# --- Triton: attention ---------------------------------------------------------------------------------------------------------------


@triton.jit
def decode_kernel(q, k, v, ks, vs, sums, logs, tokens, part, SCALE: tl.constexpr, CODES: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """One part of the context of one sequence: all heads are the rows of one tile. Leaves normalised f32 sums and the logarithm of their weight."""
    b, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, D)
    query = tl.load(q + b * ROWS * D + rows[:, None] * D + columns[None, :])
    most = tl.full([ROWS], -float("inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    first = s * part
    last = tl.minimum(first + part, tokens)
    for t in range(first, last, BLOCK):
        at = t + tl.arange(0, BLOCK)
        there = at < last
        offset = (b * tokens + at)[:, None] * D + columns[None, :]
        key = tl.load(k + offset, mask=there[:, None], other=0.0)
        value = tl.load(v + offset, mask=there[:, None], other=0.0)
        score = tl.dot(query, tl.trans(key.to(tl.bfloat16))) * SCALE
        if CODES:
            score *= tl.load(ks + b * tokens + at, mask=there, other=0.0)[None, :]
        score = tl.where(there[None, :], score, -float("inf"))
        higher = tl.maximum(most, tl.max(score, 1))
        fade = tl.exp2(most - higher)
        p = tl.exp2(score - higher[:, None])
        weight = weight * fade + tl.sum(p, 1)
        if CODES:
            p *= tl.load(vs + b * tokens + at, mask=there, other=0.0)[None, :]
        acc = acc * fade[:, None] + tl.dot(p.to(tl.bfloat16), value.to(tl.bfloat16))
        most = higher
    place = (b * tl.num_programs(1) + s) * ROWS
    tl.store(sums + (place + rows)[:, None] * D + columns[None, :], acc / weight[:, None])
    tl.store(logs + place + rows, most + tl.log2(weight))


@triton.jit
def combine_kernel(sums, logs, out, scales, batch, SPLITS: tl.constexpr, POWER: tl.constexpr, CODES: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr):
    """One head of one sequence: parts added up, then bf16, or e4m3 in groups of 128."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts, columns = tl.arange(0, POWER), tl.arange(0, D)
    there = parts < SPLITS
    place = (b * SPLITS + parts) * ROWS + h
    log = tl.load(logs + place, mask=there, other=-float("inf"))
    w = tl.exp2(log - tl.max(log, 0))
    x = tl.load(sums + place[:, None] * D + columns[None, :], mask=there[:, None], other=0.0)
    y = tl.sum(x * w[:, None], 0) / tl.sum(w, 0)
    to = (b * ROWS + h) * D + columns
    if CODES:
        g = tl.reshape(y, [D // 128, 128])
        scale = tl.maximum(tl.max(tl.abs(g), 1) / 448.0, 1e-12)
        tl.store(out + to, tl.reshape(g / scale[:, None], [D]).to(tl.float8e4nv))
        tl.store(scales + (h * (D // 128) + tl.arange(0, D // 128)) * batch + b, scale)
    else:
        tl.store(out + to, y.to(tl.bfloat16))


def decode_configs():
    """Tokens of a tile, warps, stages."""
    return [(32, 4, 3), (32, 4, 4), (64, 4, 2), (64, 4, 3), (64, 8, 2), (64, 8, 3)]


class Decode:
    """Flash-decode with one configuration; `quantised`: results become codes, which the layer with fp8 wants."""

    def __init__(self, batch, tokens, splits, config, quantised=False):
        self.batch, self.tokens, self.config, self.quantised = batch, tokens, config, quantised
        self.part = -(-tokens // splits // config[0]) * config[0]
        self.splits = -(-tokens // self.part)
        self.sums = torch.empty(batch, self.splits, HEADS, DIM, device="cuda")
        self.logs = torch.empty(batch, self.splits, HEADS, device="cuda")
        self.out = torch.empty(batch, WIDE, device="cuda", dtype=e4m3 if quantised else torch.bfloat16)
        self.scales = torch.empty(WIDE // 128, batch, device="cuda")

    def __call__(self, q, cache):
        k, v, ks, vs = cache
        block, warps, stages = self.config
        decode_kernel[(self.batch, self.splits)](q, k, v, ks, vs, self.sums, self.logs, self.tokens, self.part, DIM**-0.5 * 1.4426950408889634,
            k.dtype == e4m3, HEADS, DIM, block, num_warps=warps, num_stages=stages)  # fmt: skip
        combine_kernel[(self.batch, HEADS)](self.sums, self.logs, self.out, self.scales, self.batch, self.splits, triton.next_power_of_2(self.splits),
            self.quantised, HEADS, DIM, num_warps=4)  # fmt: skip
        return self.out


# --- Triton: contractions ------------------------------------------------------------------------------------------------------------


@triton.jit
def scaled_kernel(x, xs, w, ws, out, m, n, k, steps, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr):
    """A tile of x[m, k] w[n, k]^T over a part of k; scales xs[k/128, m] and ws[n/128, k/128]. f32 parts where k is split, else bf16."""
    column, row, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, columns, depth = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN), tl.arange(0, 128)
    acc = tl.zeros([BM, BN], tl.float32)
    first = part * steps
    for step in range(first, tl.minimum(first + steps, k // 128)):
        at = step * 128 + depth
        a = tl.load(x + rows[:, None] * k + at[None, :], mask=(rows < m)[:, None], other=0.0)
        b = tl.load(w + columns[None, :] * k + at[:, None])
        sa = tl.load(xs + step * m + rows, mask=rows < m, other=0.0)
        sb = tl.load(ws + (column * BN // 128) * (k // 128) + step)
        acc += tl.dot(a, b) * (sa * sb)[:, None]
    to = part * m * n + rows[:, None] * n + columns[None, :]
    if SPLIT:
        tl.store(out + to, acc, mask=(rows < m)[:, None])
    else:
        tl.store(out + to, acc.to(tl.bfloat16), mask=(rows < m)[:, None])


@triton.jit
def add_parts_kernel(parts, out, count, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for p in tl.static_range(PARTS):
        acc += tl.load(parts + p * count + at)
    tl.store(out + at, acc.to(tl.bfloat16))


def gemm_configs(m):
    return [(bm, bn, warps, stages) for bm in ((64,) if m == 64 else (64, 128)) for bn in (32, 64, 128) for warps, stages in ((4, 4), (4, 6), (8, 4)) if bm * bn < 128 * 128 or warps == 8]


class TritonScaled:
    def __init__(self, m, n, k, config, split):
        self.shape, self.config = (m, n, k), config
        self.steps = -(-(k // 128) // split)
        self.split = -(-(k // 128) // self.steps)
        self.parts = torch.empty(self.split, m, n, device="cuda") if self.split > 1 else None
        self.out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)

    def __call__(self, x, xs, w, ws):
        (m, n, k), (bm, bn, warps, stages) = self.shape, self.config
        grid = (n // bn, -(-m // bm), self.split)
        scaled_kernel[grid](x, xs, w, ws, self.parts if self.split > 1 else self.out, m, n, k, self.steps, bm, bn, self.split > 1, num_warps=warps, num_stages=stages)
        if self.split > 1:
            add_parts_kernel[(m * n // 1024,)](self.parts, self.out, m * n, self.split, 1024)
        return self.out


def scaled_mm(x, xs, w, ws):
    return torch._scaled_mm(x, w.t(), scale_a=xs.t(), scale_b=ws.t(), out_dtype=torch.bfloat16)


# --- Triton: what else a layer does --------------------------------------------------------------------------------------------------


@triton.jit
def norm_kernel(x, y, w, residual, out, scales, rows, stride, N: tl.constexpr, POWER: tl.constexpr, ADD: tl.constexpr, CODES: tl.constexpr, EPS: tl.constexpr):
    """Adds y to x where asked, keeps that, and normalises it: bf16, or e4m3 in groups of 128."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, POWER)
    there = at < N
    v = tl.load(x + row * stride + at, mask=there, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(y + row * N + at, mask=there, other=0.0).to(tl.float32)
        v = v.to(tl.bfloat16)
        tl.store(residual + row * N + at, v, mask=there)
        v = v.to(tl.float32)
    v *= tl.rsqrt(tl.sum(v * v, 0) / N + EPS)
    v *= tl.load(w + at, mask=there, other=0.0).to(tl.float32)
    if CODES:
        g = tl.reshape(v, [POWER // 128, 128])
        scale = tl.maximum(tl.max(tl.abs(g), 1) / 448.0, 1e-12)
        tl.store(out + row * N + at, tl.reshape(g / scale[:, None], [POWER]).to(tl.float8e4nv), mask=there)
        group = tl.arange(0, POWER // 128)
        tl.store(scales + group * rows + row, scale, mask=group < N // 128)
    else:
        tl.store(out + row * N + at, v.to(tl.bfloat16), mask=there)


class Norm:
    def __init__(self, rows, n, codes, add, stride=None):
        self.rows, self.n, self.codes, self.add, self.stride = rows, n, codes, add, stride or n
        self.residual = torch.empty(rows, n, device="cuda", dtype=torch.bfloat16)
        self.out = torch.empty(rows, n, device="cuda", dtype=e4m3 if codes else torch.bfloat16)
        self.scales = torch.empty(n // 128, rows, device="cuda")

    def __call__(self, x, w, y=None):
        norm_kernel[(self.rows,)](x, y if self.add else x, w, self.residual, self.out, self.scales, self.rows, self.stride, self.n, triton.next_power_of_2(self.n),
            self.add, self.codes, EPSILON, num_warps=8)  # fmt: skip


@triton.jit
def rotate_kernel(q, down, cos, sin, k, v, ks, vs, position, tokens, stride, RANK: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, CODES: tl.constexpr):
    """Rotates a head of q in place; the program after the last head rotates the key and appends it and the value to the cache."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = tl.arange(0, D // 2)
    c, s = tl.load(cos + position * (D // 2) + half), tl.load(sin + position * (D // 2) + half)
    if h < HEADS:
        first = q + (b * HEADS + h) * D + half
    else:
        first = down + b * stride + RANK + half
    x, y = tl.load(first).to(tl.float32), tl.load(first + D // 2).to(tl.float32)
    rx, ry = x * c - y * s, y * c + x * s
    if h < HEADS:
        tl.store(first, rx.to(tl.bfloat16))
        tl.store(first + D // 2, ry.to(tl.bfloat16))
    else:
        columns = tl.arange(0, D)
        value = tl.load(down + b * stride + RANK + D + columns).to(tl.float32)
        to = (b * tokens + position) * D
        if CODES:
            scale = tl.maximum(tl.maximum(tl.max(tl.abs(rx), 0), tl.max(tl.abs(ry), 0)) / 448.0, 1e-12)
            tl.store(k + to + half, (rx / scale).to(tl.float8e4nv))
            tl.store(k + to + D // 2 + half, (ry / scale).to(tl.float8e4nv))
            tl.store(ks + b * tokens + position, scale)
            scale = tl.maximum(tl.max(tl.abs(value), 0) / 448.0, 1e-12)
            tl.store(v + to + columns, (value / scale).to(tl.float8e4nv))
            tl.store(vs + b * tokens + position, scale)
        else:
            tl.store(k + to + half, rx.to(tl.bfloat16))
            tl.store(k + to + D // 2 + half, ry.to(tl.bfloat16))
            tl.store(v + to + columns, value.to(tl.bfloat16))


@triton.jit
def read_kernel(x, out, BLOCK: tl.constexpr, TIMES: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK * TIMES + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(TIMES):
        acc ^= tl.load(x + at + i * BLOCK)
    tl.store(out + tl.program_id(0), tl.max(acc, 0))


# --- data and time -------------------------------------------------------------------------------------------------------------------


def drawn(*shape, kind=torch.bfloat16, spread=1.0):
    """Normal, a pool of values repeated where there are many."""
    count, pool = math.prod(shape), 1 << 26
    x = torch.randn(min(count, pool), device="cuda").mul_(spread)
    x = (x.clamp_(-448, 448) if kind == e4m3 else x).to(kind)
    if count > pool:
        x = x.view(torch.uint8).repeat(-(-count // pool))[: count * x.element_size()].view(kind)
    return x.view(*shape)


def quantised(x):
    """Codes [m, k] and scales [k/128, m]."""
    g = x.float().unflatten(-1, (-1, 128))
    scale = g.abs().amax(-1, keepdim=True) / 448
    return (g / scale).to(e4m3).flatten(-2), scale[..., 0].t().contiguous()


def drawn_weight(n, k):
    return drawn(n, k, kind=e4m3, spread=100.0), (torch.rand(n // 128, k // 128, device="cuda") + 0.5) * (0.01 / math.sqrt(k))


def drawn_cache(batch, tokens, kind):
    k, v = (drawn(batch, tokens, DIM, kind=kind, spread=100.0 if kind == e4m3 else 1.0) for _ in "kv")
    if kind == torch.bfloat16:
        none = torch.empty(1, device="cuda")
        return k, v, none, none
    return k, v, *((torch.rand(batch, tokens, device="cuda") + 0.5) * 0.01 for _ in "kv")


def graph_of(calls):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def time_of(calls, quick=False):
    """Microseconds of a call: median over replays of a graph of all calls in turn, each with inputs of its own."""
    calls = calls * -(-8 // len(calls))
    graph = graph_of(calls)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
    times = []
    graph.replay()
    for _ in range(3 if quick else 15):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times)


def relative(got, expected):
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm()).item()


def copies(bytes_each):
    return max(2, min(24, -(-2 * cached // bytes_each)))


def read_rate():
    count = 1 << 29
    x, out = torch.ones(count, device="cuda", dtype=torch.int32), torch.empty(1 << 20, device="cuda", dtype=torch.int32)
    rates = []
    for block, times, warps in ((2048, 8, 8), (1024, 16, 4), (4096, 4, 8), (1024, 8, 4)):
        rates.append(4 * count / time_of([lambda b=block, t=times, w=warps: read_kernel[(count // (b * t),)](x, out, b, t, num_warps=w)] * 2))
    return max(rates) * 1e6


class Best:
    """Candidates for one piece of work; the fastest of those that are right."""

    def __init__(self, bound):
        self.bound, self.us, self.name, self.make, self.all, self.refused = bound, math.inf, "none", None, {}, {}

    def offer(self, name, calls, check, make=None, quick=False):
        try:
            error = check()
            if not error <= self.bound:
                raise ValueError(f"relative error {error:.3g}")
            us = time_of(calls, quick)
        except Exception as e:  # a peer that cannot do this is none
            self.refused[name] = str(e).strip().split("\n")[0][:120]
            torch.cuda.synchronize()
            return
        self.all[name] = min(us, self.all.get(name, math.inf))
        if us < self.us:
            self.us, self.name, self.make = us, name, make


def attention_peers(batch, tokens, kind):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    size = 2 * batch * tokens * DIM * (2 if kind == torch.bfloat16 else 1)
    n = max(1, min(3, -(-cached // size)))
    caches = [drawn_cache(batch, tokens, kind) for _ in range(n)]
    queries = [drawn(batch, HEADS, DIM) for _ in range(n)]
    few = min(batch, 2)

    def check(got):
        k, v, ks, vs = (x[:few].double() if x.numel() > 1 else None for x in caches[0])
        k, v = (x if s is None else x * s[..., None] for x, s in ((k, ks), (v, vs)))
        expected = ((queries[0][:few].double() @ k.mT) * DIM**-0.5).softmax(-1) @ v
        return relative(got.view(batch, HEADS, DIM)[:few], expected)

    best = Best(0.02)
    if kind == torch.bfloat16:
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
            for grouped in (False, True):
                if backend == SDPBackend.MATH and (grouped or batch * tokens > 1 << 20):
                    continue  # it copies the keys for every head, or writes all scores

                def call(i, backend=backend, grouped=grouped):
                    k, v = (x[:, None] for x in caches[i][:2])
                    with sdpa_kernel(backend):
                        if grouped:
                            return torch.nn.functional.scaled_dot_product_attention(queries[i][:, :, None], k, v, enable_gqa=True)
                        return torch.nn.functional.scaled_dot_product_attention(queries[i][:, None], k, v)

                name = f"SDPA {backend.name.split('_')[0].lower()}{' grouped' if grouped else ' packed'}"
                best.offer(name, [lambda i=i: call(i) for i in range(n)], lambda: check(call(0)), quick=tokens > 8192)
    name = f"Triton {'bf16' if kind == torch.bfloat16 else 'fp8'}"
    units = 132 / batch
    for config in decode_configs():
        for splits in sorted({max(1, round(units * x)) for x in (1, 2, 4, 8)}):
            if tokens / splits < config[0]:
                continue
            peer = Decode(batch, tokens, splits, config)
            best.offer(name, [lambda i=i: peer(queries[i], caches[i]) for i in range(n)], lambda: check(peer(queries[0], caches[0])), (splits, config), quick=True)
    if best.make and best.name == name:  # the one chosen, measured as the others were
        peer = Decode(batch, tokens, *best.make)
        best.us = best.all[name] = time_of([lambda i=i: peer(queries[i], caches[i]) for i in range(n)])
    return best


def gemm_peers(m, n, k, kind):
    best = Best(0.01)
    if kind == torch.bfloat16:
        count = copies(2 * n * k)
        weights = [drawn(n, k, spread=k**-0.5) for _ in range(count)]
        x = drawn(m, k)
        for name, call in (("cuBLAS bf16", torch.nn.functional.linear),):
            best.offer(name, [lambda w=w: call(x, w) for w in weights], lambda: relative(call(x, weights[0]), x.double() @ weights[0].double().T), call)
        return best
    count = copies(n * k)
    weights = [drawn_weight(n, k) for _ in range(count)]
    x, xs = quantised(drawn(m, k))
    expected = (x.double().unflatten(-1, (-1, 128)) * xs.t().double()[..., None]).flatten(-2) @ (
        weights[0][0].double() * weights[0][1].double().repeat_interleave(128, 0).repeat_interleave(128, 1)).T  # fmt: skip
    best.offer("cuBLASLt fp8 blocks", [lambda w=w: scaled_mm(x, xs, *w) for w in weights], lambda: relative(scaled_mm(x, xs, *weights[0]), expected), scaled_mm)
    for config in gemm_configs(m):
        for split in (1, 2, 4, 8):
            if split > 1 and n // config[1] * split * -(-m // config[0]) > 1200:
                continue
            peer = TritonScaled(m, n, k, config, split)
            best.offer("Triton fp8 blocks", [lambda w=w: peer(x, xs, *w) for w in weights], lambda: relative(peer(x, xs, *weights[0]), expected), (config, split), quick=True)
    if isinstance(best.make, tuple):
        peer = TritonScaled(m, n, k, *best.make)
        best.us = best.all["Triton fp8 blocks"] = time_of([lambda w=w: peer(x, xs, *w) for w in weights])
    return best


def layer_peers(kind, gemms, attention):
    """Microseconds of a whole attention layer: from the residual stream to the codes or rows that the FFN gets."""
    batch, tokens = layer_shape
    codes, layers = kind == e4m3, 4
    contract = {}
    for name, (n, k) in shapes.items():
        make = gemms[name].make
        contract[name] = TritonScaled(batch, n, k, *make) if isinstance(make, tuple) else make
    weights = [{name: drawn_weight(n, k) if codes else (drawn(n, k, spread=k**-0.5),) for name, (n, k) in shapes.items()} for _ in range(layers)]
    caches = [drawn_cache(batch, tokens, kind) for _ in range(layers)]
    norms = [[drawn(n) for n in (HIDDEN, RANK, HIDDEN)] for _ in range(layers)]
    angle = torch.arange(tokens, device="cuda")[:, None] * THETA ** (-torch.arange(DIM // 2, device="cuda") / (DIM // 2))
    cos, sin = angle.cos().float().contiguous(), angle.sin().float().contiguous()
    x, y = drawn(batch, HIDDEN), drawn(batch, HIDDEN)
    before, between, after = Norm(batch, HIDDEN, codes, True), Norm(batch, RANK, codes, False, RANK + 2 * DIM), Norm(batch, HIDDEN, codes, True)
    use_sdpa = attention.name.startswith("SDPA")
    attend = None if use_sdpa else Decode(batch, tokens, *attention.make, quantised=codes)

    def linear(name, source, w):
        return contract[name](source.out, source.scales, *w[name]) if codes else contract[name](source if torch.is_tensor(source) else source.out, *w[name])

    def layer(i):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        w, cache = weights[i], caches[i]
        before(x, norms[i][0], y)
        down = linear("q_down, k, v", before, w)
        between(down, norms[i][1])
        q = linear("q_up", between, w)
        rotate_kernel[(batch, HEADS + 1)](q, down, cos, sin, *cache, tokens - 1, tokens, RANK + 2 * DIM, RANK, HEADS, DIM, codes, num_warps=2)
        if use_sdpa:
            backend = next(b for b in SDPBackend.__members__.values() if b.name.lower().startswith(attention.name.split()[1] + "_") or b.name.lower() == attention.name.split()[1])
            with sdpa_kernel(backend):
                k, v = (t[:, None] for t in cache[:2])
                if "grouped" in attention.name:
                    attended = torch.nn.functional.scaled_dot_product_attention(q.view(batch, HEADS, 1, DIM), k, v, enable_gqa=True)
                else:
                    attended = torch.nn.functional.scaled_dot_product_attention(q.view(batch, 1, HEADS, DIM), k, v)
                attended = attended.reshape(batch, WIDE)
        else:
            attended = attend(q, cache)
        out = linear("o_proj", attend if codes else attended, w)
        after(before.residual, norms[i][2], out)

    return time_of([lambda i=i: layer(i) for i in range(layers)])


# --- table ---------------------------------------------------------------------------------------------------------------------------


class Ours:
    """What step3-bench measured: DIR/PRECISION-ROWSxCONTEXT.json, and DIR/PRECISION.costs.json, which says what each kernel does."""

    def __init__(self, folder, precision):
        self.folder, self.precision = folder, precision
        with open(f"{folder}/{precision}.costs.json") as f:
            self.about = {name: cost["about"] for name, cost in json.load(f)["attention"].items()}

    def report(self, rows, context):
        try:
            with open(f"{self.folder}/{self.precision}-{rows}x{context}.json") as f:
                return json.load(f)
        except (OSError, ValueError):
            return None

    def kernels(self, rows, context, wanted, layers=4):
        """Microseconds in a layer of the kernels that `wanted` takes by what they do."""
        report = self.report(rows, context)
        if report is None:
            return None
        each = [k["full"]["time"]["median"] / 1000 * k["launches"] / layers / report["slots"] for k in report["kernels"] if wanted(self.about[k["name"]])]
        return sum(each) or None

    def attention(self, rows, context):
        return self.kernels(rows, context, lambda about: " heads " in about)

    def gemm(self, rows, n, k):
        weight = "e4m3" if self.precision == "fp8" else "bf16"
        parts = (n,) if n != RANK + 2 * DIM else (n, RANK, DIM)
        return self.kernels(rows, 4096, lambda about: any(f"{weight}[{part},{k}]" in about.split(":")[0] for part in parts) and "linear" in about)

    def layer(self, rows, context):
        report = self.report(rows, context)
        if report is None:
            return None
        groups = [g for g in report["groups"] if any(" heads " in self.about[k] for k in g["kernels"])]
        # of layers alike, those that begin with what the FFN made
        return min((g for g in groups if g["count"] == max(x["count"] for x in groups)), key=lambda g: len(g["kernels"]))["time"]["median"] / 1000

    def ceiling(self, what):
        found = [r["ceilings"][what] for r in (self.report(b, s) for b, s in attention_shapes) if r and what in r["ceilings"]]
        return max(found, default=0)


def table(ours, report):
    read = max([report["read"]] + [o.ceiling("read") for o in ours.values()])
    peak = {p: max(o.ceiling(p) for o in ours.values()) for p in ours}
    products = ", ".join(f"{p} {flops / 1e12:.0f}" for p, flops in peak.items())
    print(f"{report['device']}: reads {read / 1e9:.0f} GB/s, by Triton {report['read'] / 1e9:.0f}; products {products} TFLOP/s\n")
    print(f"{'':36}{'ours us':>9}{'% of roof':>10}   {'best peer':24}{'us':>8}{'% of roof':>10}{'peer/ours':>11}")

    def line(what, mine, best, floor):
        of = lambda us: f"{100 * floor / us:.0f}" if us and math.isfinite(us) else "-"
        show = lambda us: f"{us:.1f}" if us and math.isfinite(us) else "-"
        ratio = f"{best['us'] / mine:.2f}" if mine and math.isfinite(best["us"]) else "-"
        print(f"{what:36}{show(mine):>9}{of(mine):>10}   {best['name']:24}{show(best['us']):>8}{of(best['us']):>10}{ratio:>11}")

    for p, o in ours.items():
        size = 2 if p == "bf16" else 1
        scale_bytes = 0 if p == "bf16" else 8
        for b, s in attention_shapes:
            floor = max(b * s * (2 * DIM * size + scale_bytes) / read, 4 * b * s * WIDE / (peak[p] or math.inf)) * 1e6
            line(f"MFA decode, {p} cache, B{b} S{s}", o.attention(b, s), report["attention"][p][f"{b}x{s}"], floor)
    for p, o in ours.items():
        size = 2 if p == "bf16" else 1
        for name, (n, k) in shapes.items():
            for m in gemm_rows:
                floor = max((n * k * size + m * k * size + 2 * m * n) / read, 2 * m * n * k / (peak[p] or math.inf)) * 1e6
                line(f"{name} {p}, M{m} N{n} K{k}", o.gemm(m, n, k), report["gemm"][p][f"{name} {m}"], floor)
    for p, o in ours.items():
        size, (b, s) = (2 if p == "bf16" else 1), layer_shape
        weights = sum(n * k for n, k in shapes.values())
        floor = (weights * size + b * s * (2 * DIM * size + (0 if p == "bf16" else 8))) / read * 1e6
        line(f"attention layer, {p}, B{b} S{s}", o.layer(b, s), report["layer"][p], floor)


def measure(precisions):
    report = {"device": torch.cuda.get_device_name(), "attention": {}, "gemm": {}, "layer": {}, "refused": {}, "all": {}}
    report["read"] = read_rate()

    def keep(kind, precision, key, best):
        report.setdefault(kind, {}).setdefault(precision, {})[key] = {"us": best.us, "name": best.name, "how": str(best.make) if isinstance(best.make, tuple) else ""}
        report["all"][f"{kind} {precision} {key}"] = best.all
        refused = {name: why for name, why in best.refused.items() if name not in best.all}
        if refused:
            report["refused"][f"{kind} {precision} {key}"] = refused
        print(f"{kind} {precision} {key}: {best.name} {best.us:.1f}", file=sys.stderr, flush=True)

    for precision in precisions:
        kind, gemms = e4m3 if precision == "fp8" else torch.bfloat16, {}
        for name, (n, k) in shapes.items():
            for m in gemm_rows:
                best = gemm_peers(m, n, k, kind)
                keep("gemm", precision, f"{name} {m}", best)
                if m == layer_shape[0]:
                    gemms[name] = best
                torch.cuda.empty_cache()
        best = attention_peers(*layer_shape, kind)
        us = layer_peers(kind, gemms, best)
        report["layer"][precision] = {"us": us, "name": "the best of each"}
        print(f"layer {precision}: {us:.1f}", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
        for b, s in attention_shapes:
            keep("attention", precision, f"{b}x{s}", attention_peers(b, s, kind))
            torch.cuda.empty_cache()
    return report


def compile_share(share):
    """Runs every kernel once on little data."""
    index, count = (int(x) for x in share.split("/"))
    work = []
    for kind in (torch.bfloat16, e4m3):
        for config in decode_configs():
            work.append(lambda kind=kind, config=config: Decode(2, 512, 2, config)(drawn(2, HEADS, DIM), drawn_cache(2, 512, kind)))
    for m in (64, 128):
        x, xs = quantised(drawn(m, 2048))
        for config in gemm_configs(m):
            for split in (1, 2):
                work.append(lambda m=m, x=x, xs=xs, config=config, split=split: TritonScaled(m, 256, 2048, config, split)(x, xs, *drawn_weight(256, 2048)))
    for call in work[index::count]:
        try:
            call()
        except Exception:
            pass
    torch.cuda.synchronize()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--compile")
    parser.add_argument("--ours")
    parser.add_argument("--precision", action="append", choices=["bf16", "fp8"])
    parser.add_argument("--report", help="what was measured before, instead of measuring; or where to keep it")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        if arguments.compile:
            return compile_share(arguments.compile)
        if arguments.report and os.path.exists(arguments.report):
            with open(arguments.report) as f:
                report = json.load(f)
        else:
            report = measure(arguments.precision or ["bf16", "fp8"])
            if arguments.report:
                with open(arguments.report, "w") as f:
                    json.dump(report, f, indent=1)
        table({p: Ours(arguments.ours, p) for p in report["layer"]}, report)


if __name__ == "__main__":
    main()
