"""Checks one layer of Step-3 in its full size against float64.

A bundle compiled with --no-weights gets weights that are drawn here, in the format of its weight files; `step3-run` computes logits from them,
and so does this file, which reads the weight files again and shares no code with the compiler, its interpreter or the kernels: the formulas of
the Step-3 report (MFA, softmax router without renormalisation, one shared expert), all sums in float64.

    layer.py draw BUNDLE [--seed N] [--zero TENSOR]
    layer.py check BUNDLE --config CONFIG.json --runner step3-run --attention LIB --ffn LIB [--threads N] [--wrong TENSOR]

Two references. `exact` rounds nothing but the weights, which are what the files hold. `rounded` also rounds activations where the bundle's
precision says so: to bf16 between kernels; with fp8, the input of a linear in groups of 128 of a row and the cached keys and values of a token
to e4m3 with the scale max/448. Errors are relative, by the Frobenius norm, over all logits of all positions.

How near `rounded` has to be: a sum that is off by a little moves some values over the border between two codes, each by a whole step, so small
errors grow on the way, with e4m3 from 0.1 % to some percent. How much is found by calculation: the reference once more, with noise on every
sum as large as `slack` allows; its distance, times `margin`, is the bound. `exact` is held to a fixed bound.

A choice of experts is decided by a difference that rounding may exceed: where the last expert chosen and the first one left out are nearer than
`tie`, either is right, and the better one counts.

A check that cannot fail says nothing: at last the reference is told one weight 1.25 times as large, and must then be far off. Exits with 3 when
anything is wrong.
"""
import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time

import torch

device = "cuda" if torch.cuda.is_available() else "cpu"
f64 = torch.float64
top = 448.0  # largest e4m3

# Bounds against `exact`. bf16 keeps 8 bits: a rounding errs by 2^-9/sqrt(3) of the value, 0.11 %, a dozen of them follow each other on the
# longest path, and some experts change. e4m3 keeps 4 bits: 2.6 %, and six follow each other.
bounds = {"bf16": 0.02, "fp8": 0.2}
# What sums may lose, of their root mean square: matrix units cut products below the largest of those they add, bf16 ones to about 22 bits and
# 8-bit ones to about 14, and the softmax's weights are sums of two codes.
slack = {"bf16": 2.0**-14, "fp8": 2.0**-10}
margin = 1.5
tie = {"bf16": 0.05, "fp8": 0.4}  # of logits of the router, whose deviation is 2

prompt_lengths = (1, 2, 63, 64, 65, 130, 333, 1100)
generated = 5

element_bytes = {"bf16": 2, "e4m3": 1, "f32": 4}


def e4m3_values():
    """The 256 values of e4m3: sign, four bits of exponent with bias 7, three of fraction; 0x7F and 0xFF are NaN."""
    code = torch.arange(256)
    exponent, fraction = (code >> 3) & 15, (code & 7).to(f64)
    size = torch.where(exponent == 0, fraction * 2.0**-9, (1 + fraction / 8) * torch.exp2(exponent.to(f64) - 7))
    size[127::128] = math.nan
    return torch.where(code >= 128, -size, size).to(device)


# --- layouts of packed weights -----------------------------------------------------------------------------------------------------------


def swizzle(tiles):
    """[..., 128 rows, 8 pieces, 16 bytes]: piece i of row r is at i xor (r mod 8); its own inverse."""
    rows, pieces = torch.arange(128, device=tiles.device)[:, None], torch.arange(8, device=tiles.device)[None]
    return tiles[..., rows, pieces ^ (rows % 8), :]


def pack_tiles(rows):
    """[N, bytes]: tiles of 128 rows by 128 bytes, along a row first, swizzled; zeros past the end."""
    n, width = rows.shape
    rows = torch.nn.functional.pad(rows, (0, -width % 128, 0, -n % 128))
    return swizzle(rows.view(rows.shape[0] // 128, 128, -1, 8, 16).permute(0, 2, 1, 3, 4)).reshape(-1)


def unpack_tiles(packed, n, width):
    tiles = swizzle(packed.view(-(-n // 128), -(-width // 128), 128, 8, 16))
    return tiles.permute(0, 2, 1, 3, 4).reshape(-(-n // 128) * 128, -1)[:n, :width]


def pack_panels(rows, size):
    """[N, bytes] of elements of `size` bytes: panels of 16 rows, in them pairs of columns; the two of a row together (bf16) or apart (codes)."""
    n, width = rows.shape
    cells = torch.nn.functional.pad(rows, (0, 0, 0, -n % 16)).view(-1, 16, width // (2 * size), 2, size)
    return cells.permute(0, 2, 1, 3, 4).reshape(-1) if size == 2 else cells.permute(0, 2, 3, 1, 4).reshape(-1)


def unpack_panels(packed, n, width, size):
    pairs = width // (2 * size)
    cells = packed.view(-1, pairs, 16, 2, size) if size == 2 else packed.view(-1, pairs, 2, 16, size).transpose(2, 3)
    return cells.permute(0, 2, 1, 3, 4).reshape(-1, width)[:n]


def packed(rows, layout, size):
    return {"rows": lambda: rows.reshape(-1), "tiles": lambda: pack_tiles(rows), "panels": lambda: pack_panels(rows, size)}[layout]()


def unpacked(data, layout, n, width, size):
    return {"rows": lambda: data[: n * width].view(n, width), "tiles": lambda: unpack_tiles(data, n, width), "panels": lambda: unpack_panels(data, n, width, size)}[layout]()


# --- bundles -----------------------------------------------------------------------------------------------------------------------------


class Bundle:
    """What a bundle says of its weights, and the weights."""

    def __init__(self, path):
        self.path = path
        with open(f"{path}/manifest.json") as f:
            self.manifest = json.load(f)
        with open(f"{path}/schedule-decode.json") as f:
            programs = json.load(f)["programs"]
        assert [p["rank"]["name"] for p in programs] == ["a0", "f0"], "one attention and one FFN rank"
        self.precision = self.manifest["precision"]["weights"]
        self.weights, self.files = {}, {}
        for program in programs:
            role, target = program["rank"]["role"], program["rank"]["target"]
            name = f"{path}/weights/{'attention' if role == 'attention' else 'ffn0'}.safetensors"
            self.files[program["rank"]["name"]] = name
            for buffer in program["buffers"]:
                if buffer["region"] == "weights" and buffer.get("binds", buffer["name"]) not in self.weights:
                    buffer.update(file=name, packing="tiles" if target.startswith("cuda") else "panels")
                    self.weights[buffer.get("binds", buffer["name"])] = buffer
        self.values = e4m3_values()

    def layout(self, name):
        vector = len(self.weights[name]["shape"]) == 1
        return "rows" if vector or name in ("embed", "rope") or name.endswith("_scales") else self.weights[name]["packing"]

    def open(self):
        """Where each tensor lies in the files."""
        for path in self.files.values():
            with open(path, "rb") as f:
                length = int.from_bytes(f.read(8), "little")
                header = json.loads(f.read(length))
            data = torch.from_file(path, size=os.path.getsize(path), dtype=torch.uint8)
            for name, entry in header.items():
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    self.weights[name]["data"] = data[8 + length + begin : 8 + length + end].to(device)
        return self

    def bytes(self, name, matrix=0):
        """Rows of bytes of one matrix of a weight."""
        b = self.weights[name]
        size = element_bytes[b["dtype"]]
        shape = b["shape"] if len(b["shape"]) > 1 else [1, *b["shape"]]
        # packed matrices are multiples of 64 bytes; what is in plain rows is padded at its end
        each = shape[-2] * shape[-1] * size if self.layout(name) == "rows" else b["bytes"] // math.prod(shape[:-2])
        data = b["data"][matrix * each : (matrix + 1) * each]
        return unpacked(data, self.layout(name), shape[-2], shape[-1] * size, size)

    def stored(self, name, matrix=0):
        """The numbers as they are stored, float64."""
        rows = self.bytes(name, matrix)
        kind = self.weights[name]["dtype"]
        if kind == "e4m3":
            return self.values[rows.long()]
        return rows.contiguous().view({"bf16": torch.bfloat16, "f32": torch.float32}[kind]).to(f64)

    def matrix(self, name, matrix=0):
        """The weight that `name` stands for: codes times the scale of their 128 x 128 block where it is quantised."""
        if name in self.weights:
            return self.stored(name, matrix)
        codes, scales = self.stored(f"{name}_codes", matrix), self.stored(f"{name}_scales", matrix)
        n, k = codes.shape
        return codes * scales.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]


# --- drawing -----------------------------------------------------------------------------------------------------------------------------


def deviation(name, columns):
    """Of the weights: every part of the layer is about as large as the residual stream, softmaxes are neither flat nor one token."""
    gain = {"wq": 1.5, "k_proj": 1.5, "o_proj": 3, "router": 2, "mlp_down_proj": 2, "moe_down_proj": 8, "share_down_proj": 2}
    return next((g for part, g in gain.items() if part in name), 1) / math.sqrt(columns)


def draw_matrix(bundle, name, generator):
    """Bytes of one matrix in its layout."""
    b = bundle.weights[name]
    rows, columns = ([1, *b["shape"]])[-2:]
    normal = lambda: torch.randn(rows, columns, device=device, generator=generator)
    uniform = lambda: torch.rand(rows, columns, device=device, generator=generator)
    if "norm" in name:
        values = (1 + 0.2 * normal()).to(torch.bfloat16)
    elif name == "embed":
        values = normal().to(torch.bfloat16)
    elif b["dtype"] == "bf16":
        values = (deviation(name, columns) * normal()).to(torch.bfloat16)
    elif name.endswith("_scales"):
        codes = bundle.weights[name.removesuffix("_scales") + "_codes"]
        spread = bundle.values[~bundle.values.isnan()].square().mean().sqrt().item()
        values = ((0.5 + uniform()) * (deviation(name, codes["shape"][-1]) / spread)).float()
    else:  # codes: any that is a number
        values = torch.randint(256, (rows, columns), device=device, generator=generator).to(torch.uint8)
        values[(values & 127) == 127] = 0
    return packed(values.view(torch.uint8).view(rows, -1), bundle.layout(name), element_bytes[b["dtype"]])


def draw(bundle, seed, zero=None):
    """Writes the weight files of a bundle without weights and names them in its manifest; the weight `zero` is 0, to see the rest of the layer alone."""
    generator = torch.Generator(device).manual_seed(seed)
    with open(f"{bundle.path}/weights/constants.safetensors", "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        begin, end = json.loads(f.read(length))["rope"]["data_offsets"]
        f.seek(8 + length + begin)
        rope = f.read(end - begin)
    for rank, path in bundle.files.items():
        mine = sorted(((n, b) for n, b in bundle.weights.items() if b["file"] == path), key=lambda w: w[1]["offset"])
        header, about, at = {}, {}, 0
        for name, b in mine:
            assert b["offset"] == at, f"{name} is at {b['offset']}, not {at}"
            header[name] = {"dtype": "U8", "shape": [b["bytes"]], "data_offsets": [at, at + b["bytes"]]}
            about[name] = json.dumps({"dtype": b["dtype"], "shape": b["shape"]})
            at += b["bytes"]
        text = json.dumps({"__metadata__": about, **header}).encode()
        text += b" " * (-len(text) % 64)
        with open(path, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for name, b in mine:
                written = 0
                for _ in range(math.prod(b["shape"][:-2])):
                    data = rope if name == "rope" else draw_matrix(bundle, name, generator).mul_(name.removesuffix("_codes") != zero).cpu().numpy().data
                    written += f.write(data)
                written += f.write(bytes(-written % 64))
                assert written == b["bytes"], f"{name}: {written} bytes, the schedule wants {b['bytes']}"
        for entry in bundle.manifest["weights"]:
            if entry["rank"] == rank:
                entry.pop("seed", None)
                entry["file"] = os.path.relpath(path, bundle.path)
    with open(f"{bundle.path}/manifest.json", "w") as f:
        json.dump(bundle.manifest, f, indent=1)


# --- the reference -----------------------------------------------------------------------------------------------------------------------


def to_e4m3(x):
    """The nearest e4m3, ties to even; beyond the largest, the largest."""
    exponent = (torch.frexp(x)[1] - 1).clamp(min=-6)
    step = torch.exp2((exponent - 3).to(f64))
    return ((x / step).round() * step).clamp(-top, top)


class Rounding:
    """What happens to activations between kernels."""

    def __init__(self, precision, kv, on):
        self.linear, self.kv, self.on = on and precision == "fp8", on and kv == "fp8", on

    def bf16(self, x):
        return x.to(torch.float32).to(torch.bfloat16).to(f64) if self.on else x

    def groups(self, x, size):
        g = x.to(torch.float32).unflatten(-1, (-1, size))
        scale = g.abs().amax(-1, keepdim=True) / top
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        return (to_e4m3((g / scale).to(f64)) * scale.to(f64)).flatten(-2)

    def operand(self, x):
        return self.groups(x, 128) if self.linear else x

    def cached(self, x):
        return self.groups(x, x.shape[-1]) if self.kv else x


class Layer:
    """One layer of Step-3 between embedding and logits."""

    def __init__(self, bundle, config, rounding, wrong=None, slack=0.0):
        text = config.get("text_config", config)
        self.bundle, self.r, self.wrong = bundle, rounding, wrong
        self.heads, self.dim = text["num_attention_heads"], text["head_dim"]
        self.epsilon, self.theta = text.get("rms_norm_eps", 1e-5), text["rope_theta"]
        self.chosen, self.moe = text["moe_top_k"], text["moe_layers_enum"] != ""
        self.tie, self.slack = tie[bundle.precision], slack
        self.generator = torch.Generator(device).manual_seed(2)

    def weight(self, name, matrix=0):
        w = self.bundle.matrix(name, matrix)
        return w * 1.25 if name == self.wrong else w

    def norm(self, x, name):
        scaled = self.r.bf16(x * (x.square().mean(-1, keepdim=True) + self.epsilon).rsqrt())
        return self.r.bf16(scaled * self.weight(name)[0])

    def sums(self, x):
        """With what they may lose."""
        noise = torch.randn(x.shape, dtype=f64, device=device, generator=self.generator) if self.slack else 0
        return x + self.slack * x.square().mean().sqrt() * noise

    def linear(self, x, name, matrix=0):
        return self.sums(x @ self.weight(name, matrix).T)

    def rotate(self, x, positions):
        """[T, heads, dim], halves of a head rotated against each other."""
        half = self.dim // 2
        frequency = self.theta ** (-torch.arange(half, device=device, dtype=f64) / half)
        angle = (positions[:, None] * frequency)[:, None]
        a, b = x[..., :half], x[..., half:]
        return self.r.bf16(torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1))

    def attention(self, h, lengths):
        h = self.r.operand(h)
        q = self.norm(self.r.bf16(self.linear(h, "l0_q_proj")), "l0_inter_norm")
        q = self.r.bf16(self.linear(self.r.operand(q), "l0_wq")).unflatten(-1, (self.heads, self.dim))
        k, v = (self.r.bf16(self.linear(h, f"l0_{x}_proj")) for x in "kv")
        positions = torch.cat([torch.arange(n, device=device, dtype=f64) for n in lengths])
        q, k = self.rotate(q, positions), self.rotate(k[:, None], positions)[:, 0]
        k, v = self.r.cached(k), self.r.cached(v)
        out = []
        for q, k, v in zip(*(x.split(lengths) for x in (q, k, v))):
            scores = self.sums(torch.einsum("thd,sd->hts", q, k)) / math.sqrt(self.dim)
            late = torch.ones(len(k), len(k), dtype=torch.bool, device=device).triu(1)
            out.append(torch.einsum("hts,sd->thd", scores.masked_fill(late, -math.inf).softmax(-1), v).flatten(-2))
        return self.linear(self.r.operand(self.r.bf16(self.sums(torch.cat(out)))), "l0_o_proj")

    def ffn(self, x, name, matrix=0):
        gate, up = (self.linear(x, f"{name}_{part}_proj", matrix) for part in ("gate", "up"))
        return self.linear(self.r.operand(self.r.bf16(torch.nn.functional.silu(gate) * up)), f"{name}_down_proj", matrix)

    def experts(self, h):
        """Two results: with the experts that are chosen, and with the first one left out in place of the last one; and which tokens are undecided."""
        logits = self.linear(h, "l0_router")
        best, ids = logits.topk(self.chosen + 1)
        p = logits.softmax(-1).gather(1, ids)
        last = self.chosen - 1
        operand = self.r.operand(h)
        shared = self.ffn(operand, "l0_share")
        sums = [shared, shared.clone()]
        for expert in range(logits.shape[-1]):
            rows, place = (ids == expert).nonzero(as_tuple=True)
            if len(rows) == 0:
                continue
            y = p[rows, place, None] * self.ffn(operand[rows], "l0_moe", expert)
            sums[0].index_add_(0, rows[place <= last], y[place <= last])
            sums[1].index_add_(0, rows[place != last], y[place != last])
        return sums, best[:, last] - best[:, last + 1] < self.tie

    def logits(self, sequences):
        """[tokens, vocabulary] of all positions of all sequences, one after another; the same with the other choice; tokens where that is right too."""
        ids = torch.tensor([i for s in sequences for i in s], device=device)
        x = self.bundle.matrix("embed")[ids]
        x = self.r.bf16(x + self.attention(self.norm(x, "l0_input_layernorm"), [len(s) for s in sequences]))
        h = self.norm(x, "l0_post_attention_layernorm")
        if self.moe:
            results, undecided = self.experts(h)
        else:
            results, undecided = [self.ffn(self.r.operand(h), "l0_mlp")], torch.zeros(len(ids), dtype=torch.bool, device=device)
        all_logits = [self.linear(self.norm(self.r.bf16(x + self.r.bf16(y)), "norm"), "lm_head") for y in results]
        return all_logits[0], all_logits[-1], undecided


# --- comparison --------------------------------------------------------------------------------------------------------------------------


def run(arguments, prompts, folder, scoring):
    """Tokens that step3-run gave for each prompt, and f32 logits for each."""
    with open(f"{folder}/prompts.jsonl", "w") as f:
        for ids in prompts:
            f.write(json.dumps({"prompt_ids": ids, "max_tokens": generated, "temperature": 0}) + "\n")
    command = [arguments.runner, "--bundle", arguments.bundle, "--program-attention", arguments.attention, "--program-ffn", arguments.ffn]
    command += ["--prompts", f"{folder}/prompts.jsonl", "--logits", f"{folder}/logits"] + (["--score"] if scoring else [])
    command += ["--threads", str(arguments.threads)] if arguments.threads else []
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"step3-run ended with {done.returncode}: {done.stderr.strip()}")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    tokens = {e["prompt"]: e["tokens"] for e in events if "tokens" in e}
    logits = [torch.from_file(f"{folder}/logits.{p}", size=os.path.getsize(f"{folder}/logits.{p}") // 4).clone().to(device).to(f64) for p in range(len(prompts))]
    return [tokens.get(p, []) for p in range(len(prompts))], logits


def error(got, expected, other, undecided):
    """Relative error by the Frobenius norm, the worst token's, and how many tokens took the other choice."""
    distances = torch.stack([(got - e).square().sum(-1) for e in (expected, other)])
    swapped = undecided & (distances[1] < distances[0])
    distance = torch.where(swapped, distances[1], distances[0])
    size = expected.square().sum(-1)
    whole = (distance.sum() / size.sum()).sqrt().item()
    return (whole if math.isfinite(whole) else math.inf), (distance / size).max().sqrt().item(), int(swapped.sum())


def check(arguments):
    bundle = Bundle(arguments.bundle)
    name = os.path.basename(os.path.normpath(arguments.bundle)).removesuffix(".s3")
    with open(arguments.config) as f:
        config = json.load(f)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(bundle.weights["embed"]["shape"][0], (n,), generator=generator).tolist() for n in prompt_lengths]
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        tokens, decoded = run(arguments, prompts, folder, scoring=False)
        # prefill and decode see the same sequences; nothing follows the last token
        sequences = [p + t[:-1] for p, t in zip(prompts, tokens)]
        _, scored = run(arguments, sequences, folder, scoring=True)
    print(f"{name}: step3-run took {time.time() - started:.1f} s", flush=True)
    bundle.open()
    ends = torch.tensor([len(s) for s in sequences]).cumsum(0).tolist()
    newest = torch.cat([torch.arange(end - len(t), end) for end, t in zip(ends, tokens)]).to(device)
    together = lambda logits: torch.cat([x.view(-1, scored[0].numel() // len(sequences[0])) for x in logits])
    compared = [("all positions, prefill", together(scored), torch.arange(ends[-1], device=device)), ("generated tokens, decode", together(decoded), newest)]
    kv = bundle.manifest["precision"]["kv"]

    def logits(rounds, **more):
        return Layer(bundle, config, Rounding(bundle.precision, kv, rounds), **more).logits(sequences)

    def verdicts(reference, bound, about, fails=False):
        """Prints one for each kind of logits; whether all are as they must be."""
        all_right = True
        expected, other, undecided = reference
        for what, got, at in compared[: 1 if fails else 2]:
            whole, worst, swapped = error(got, expected[at], other[at], undecided[at])
            right = whole > bound if fails else whole <= bound
            all_right = all_right and right
            choices = f"; experts: {int(undecided[at].sum())} undecided, {swapped} the other way" if bool(undecided.any()) else ""
            limit = f"{'must be more than' if fails else 'at most'} {bound:.3g}"
            print(f"{'right' if right else 'WRONG'} {name}: {what} ({len(at)}) against {about}: {whole:.3g}, {limit}; worst token {worst:.3g}{choices}", flush=True)
        return all_right

    ok = verdicts(logits(False), bounds[bundle.precision], "exact float64")
    rounded = logits(True)
    spread = max(error(logits(True, slack=slack[max(bundle.precision, kv)])[0], *rounded)[0], 2.0**-9)
    ok = verdicts(rounded, margin * spread, "rounded float64") and ok
    ok = verdicts(logits(True, wrong=arguments.wrong), margin * spread, f"rounded float64 with {arguments.wrong} 1.25 times as large", fails=True) and ok
    return 0 if ok else 3


def main():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("draw")
    one.add_argument("bundle")
    one.add_argument("--seed", type=int, default=1)
    one.add_argument("--zero")
    one = commands.add_parser("check")
    one.add_argument("bundle")
    for flag in ("--config", "--runner", "--attention", "--ffn"):
        one.add_argument(flag, required=True)
    one.add_argument("--threads", type=int)
    one.add_argument("--wrong", default="l0_o_proj")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.no_grad():
        if arguments.command == "check":
            return check(arguments)
        draw(Bundle(arguments.bundle), arguments.seed, arguments.zero)
        return 0


if __name__ == "__main__":
    sys.exit(main())
