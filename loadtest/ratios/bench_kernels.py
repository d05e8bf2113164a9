"""Every native operation of the CPU against named torch calls, and against what the machine could do at best.

The shapes are SmolLM2-135M's. Everything that computes one thing runs in the same rounds, alternating in order; a
figure is the least of three. Weights and KV are cycled through copies of more than the last-level cache, because a
model step finds none of its weights there. Two threads on either side unless asked otherwise.

"x floor" is time over the longer of two floors measured in the same run: operations at the rate of a large fp32
product, and bytes that must be read at the rate of the sum of a large tensor. Integer products may beat the first,
and operands that stay in the cache the second. Beside other work no line means much: torch deals its work out in equal
parts and waits for the slowest thread. The load is printed first, the floors first and last.
"""

import argparse
import datetime
import os
from collections.abc import Callable, Sequence
from copy import copy
from itertools import cycle
from pathlib import Path

import torch
from harness import commit, machine
from rates import measure
from rounds import Bench, Calls
from torch.nn import functional

from headrace_kernels import native
from headrace_kernels.native import Buffer, Grid, Machine, Program, abi
from headrace_kernels.native.abi import Epilogue
from headrace_kernels.native.machine import Panels, buffers

COLD_BYTES = 64 << 20  # twice the last-level cache of the machine that the figures come from
HIDDEN, MLP, VOCAB = 576, 1536, 49152
HEADS, KV_HEADS, HEAD_DIM, BLOCK_TOKENS = 9, 3, 64, 16
GROUP = HEADS // KV_HEADS
LINEARS = {
    "qkv": (HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
    "gate-up": (HIDDEN, 2 * MLP),
    "down": (MLP, HIDDEN),
    "head": (HIDDEN, VOCAB),
}
ROWS = (1, 4, 8, 32, 128, 512)
DECODES = ((1, 512), (1, 2048), (1, 8000), (16, 2100), (32, 300))
PREFILLS = (1024, 4096, 8192)
SMALL_TOGETHER = 32
"""Operations of a call of the library; a layer has five to seven."""
SLOW_BF16_TOKENS = 4096
"""From here on SDPA in bf16 is left out by default: without bf16 instructions a call takes seconds."""
FARTHEST = 0.02  # int8 inputs and bf16 KV stay below 0.01 of the norm; a wrong operand is near 1


class NativeCalls:
    """Calls of the operations of a program in turn, over one step; a team of threads of its own."""

    def __init__(self, program: Program, step: abi.Step, held: Sequence[torch.Tensor], threads: int) -> None:
        """Plan the step, which the operations of a model share.

        Args:
            program: Operations that may be run in any order.
            step: What they compute on.
            held: Tensors that the step points to.
            threads: Size of the team.
        """
        self._program, self._step, self._held, self._threads = program, step, held, threads
        self._operations, self._next = program.operations(), 0
        self._machine = Machine(threads)
        self._machine.begin(step, threads, HEADS, KV_HEADS)

    def __call__(self, num_calls: int) -> None:
        """Run that many operations."""
        while num_calls > 0:
            together = min(num_calls, len(self._program) - self._next)
            self._machine.run(self._operations, self._next, together, self._step, self._threads)
            self._next = (self._next + together) % len(self._program)
            num_calls -= together


def torch_calls(call: Callable[[torch.Tensor], torch.Tensor], operands: list[torch.Tensor]) -> Calls:
    """Return calls over operands in turn."""
    turn = cycle(operands)

    def run(num_calls: int) -> None:
        with torch.inference_mode():
            for _ in range(num_calls):
                call(next(turn))

    return run


def copies(size_bytes: int) -> int:
    """Return how many operands of a size do not fit into the cache together."""
    return -(-COLD_BYTES // size_bytes)


def check(what: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Refuse to time what computes something else.

    Raises:
        RuntimeError: The two are too far apart.
    """
    distance = float((found - wanted).norm() / wanted.norm())
    if not distance < FARTHEST:
        raise RuntimeError(f"{what}: off by {distance:.3f} of the norm")


def random_grid(out_size: int, in_size: int) -> Grid:
    """Return int4 weights of about the size of a trained model's."""
    scales = ((torch.rand(out_size, in_size // 32) + 0.5) / 64).half()
    codes = torch.randint(0, 16, (out_size, in_size), dtype=torch.uint8)
    return Grid(codes=codes, scales=scales, minima=-7.5 * scales)


def gated(products: torch.Tensor) -> torch.Tensor:
    """Return what a gated layer makes of gates and ups side by side."""
    gate, up = products.chunk(2, dim=1)
    return functional.silu(gate) * up


class Linears:
    """All ways to multiply by one weight; `gate-up` includes its activation on either side."""

    def __init__(self, name: str, threads: int) -> None:
        """Pack the weight in all formats, as often as it takes to leave the cache."""
        self._threads = threads
        self._in_size, self._out_size = LINEARS[name]
        self._is_gated = name == "gate-up"
        self._finish = gated if self._is_gated else lambda products: products
        grid = random_grid(self._out_size, self._in_size)
        dense = grid.dequantise()
        ordered, rows = grid, torch.arange(self._out_size)
        if self._is_gated:
            rows = native.interleave(*rows.chunk(2))
            ordered = grid.rows(rows)
        whole = Grid(codes=ordered.codes.to(torch.int8) - 7, scales=ordered.scales, minima=None)
        weights: dict[str, Grid | torch.Tensor] = {
            "int4": ordered,
            "int4, 8 bit": ordered,
            "int8": whole,
            "bf16": dense[rows],
        }
        self._panels = {
            form: self._packed(Panels(weight, 8 if "8 bit" in form else 16)) for form, weight in weights.items()
        }
        back = rows.argsort()
        self._dense = {"int4": dense, "int4, 8 bit": dense, "int8": whole.dequantise()[back], "bf16": dense}
        self._plain = [dense.clone() for _ in range(copies(4 * dense.numel()))]
        # Packed for a typical number of rows, as torch's own compiler does.
        self._prepacked = [torch.ops.mkldnn._reorder_linear_weight(weight, 32) for weight in self._plain]

    def kernels(self, x: torch.Tensor) -> dict[str, tuple[Calls, dict[str, float]]]:
        """Return the native ways for some inputs."""
        rows = x.shape[0]
        found: dict[str, tuple[Calls, dict[str, float]]] = {}
        out = torch.empty(rows, self._out_size // 2 if self._is_gated else self._out_size)
        step = abi.Step(num_rows=rows, buffers=buffers(x, out, *[torch.empty(1)] * 4))
        for form, panels in self._panels.items():
            program = Program()
            for each in panels:
                epilogue = Epilogue.SILU if self._is_gated else Epilogue.STORE
                program.linear(each, Buffer.HIDDEN, Buffer.QKV, epilogue=epilogue)
            calls = NativeCalls(program, step, [x, out], self._threads)
            calls(1)
            check(form, out, self._finish(functional.linear(x, self._dense[form])))
            work = {"flops": 2.0 * rows * self._in_size * self._out_size, "bytes": float(panels[0].data.numel())}
            found[form] = (calls, work)
        return found

    def peers(self, x: torch.Tensor) -> dict[str, Calls]:
        """Return torch's ways."""
        prepacked = torch.ops.mkldnn._linear_pointwise
        return {
            "F.linear fp32": torch_calls(lambda w: self._finish(functional.linear(x, w)), self._plain),
            "prepacked fp32": torch_calls(
                lambda w: self._finish(prepacked(x, w, None, "none", [], "")), self._prepacked
            ),
        }

    @staticmethod
    def _packed(panels: Panels) -> list[Panels]:
        found = [panels]
        for _ in range(copies(panels.data.numel()) - 1):
            found.append(copy(panels))
            found[-1].data = panels.data.clone()
        return found


class Attention:
    """All ways to attend over sequences of one length, in as many layers as it takes to leave the cache.

    Attributes:
        kernel: The native way, rotary embedding and KV write included, and its work.
        peers: Torch's ways over KV that was gathered before, by name.
    """

    def __init__(self, sequences: int, entries: int, queries: int, threads: int) -> None:
        """Fill the KV of sequences of `entries`, the last `queries` of them new: one, or all."""
        blocks = -(-entries // BLOCK_TOKENS)
        kv_bytes = sequences * entries * 2 * KV_HEADS * HEAD_DIM * 2
        layers = copies(kv_bytes) if queries == 1 else 1
        arena = torch.randn(sequences * blocks, layers, 2, BLOCK_TOKENS, KV_HEADS, HEAD_DIM).bfloat16()
        tables = torch.randperm(sequences * blocks).view(sequences, blocks)
        qkv = torch.randn(sequences * queries, HEADS + 2 * KV_HEADS, HEAD_DIM)
        out = torch.empty(sequences * queries, HEADS, HEAD_DIM)
        calls = NativeCalls(attend_program(layers), *attend_step(tables, entries, arena, qkv, out), threads)
        calls(layers)
        seen = sum(range(entries - queries + 1, entries + 1))
        work = {"flops": 4.0 * sequences * seen * HEADS * HEAD_DIM, "bytes": float(kv_bytes)}
        self.kernel = (calls, work)
        gathered = arena[tables].permute(2, 3, 0, 5, 1, 4, 6).reshape(layers, 2, sequences, KV_HEADS, -1, HEAD_DIM)
        gathered = gathered[..., :entries, :].contiguous()
        self.peers: dict[str, Calls] = {}
        if queries == 1:
            q = qkv[:, :HEADS].reshape(sequences, KV_HEADS, GROUP, HEAD_DIM)
            check("attend", out.view_as(q), two_products(q, gathered[-1].float()))
            self.peers["matmuls fp32"] = torch_calls(lambda kv: two_products(q, kv), list(gathered.float()))
        else:
            q = qkv[:, :HEADS].transpose(0, 1)[None].contiguous()
            gathered = gathered.repeat_interleave(GROUP, dim=3)
            check("attend", out.transpose(0, 1)[None], sdpa(q, gathered[0].float()))
            self.peers["SDPA fp32"] = torch_calls(lambda kv: sdpa(q, kv), list(gathered.float()))
        narrow = q.bfloat16()
        self.peers["SDPA bf16"] = torch_calls(lambda kv: sdpa(narrow, kv), list(gathered))


def attend_program(layers: int) -> Program:
    """Return the attention of every layer."""
    program = Program()
    for layer in range(layers):
        what = abi.Attend(heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, layer=layer, scale=HEAD_DIM**-0.5)
        what.source, what.target = Buffer.QKV, Buffer.ATTENDED
        program.attend(what)
    return program


def attend_step(
    tables: torch.Tensor, entries: int, arena: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor
) -> tuple[abi.Step, list[torch.Tensor]]:
    """Return a step whose rows are the last entries of each sequence, and what it points to."""
    sequences, queries = tables.shape[0], qkv.shape[0] // tables.shape[0]
    positions = torch.arange(entries - queries, entries).repeat(sequences)
    tensors = {
        "positions": positions,
        "write_blocks": tables.repeat_interleave(queries, 0).gather(1, positions[:, None] // BLOCK_TOKENS),
        "write_slots": positions % BLOCK_TOKENS,
        "cu_seqlens": torch.arange(sequences + 1) * queries,
        "block_tables": tables,
        "kv_lengths": torch.full((sequences,), entries),
        "arena": arena,
        "frequencies": torch.zeros(HEAD_DIM // 2, dtype=torch.float64),  # torch's ways turn nothing either
    }
    step = abi.Step(
        num_rows=qkv.shape[0],
        num_sequences=sequences,
        table_width=tables.shape[1],
        num_layers=arena.shape[1],
        block_tokens=BLOCK_TOKENS,
        num_ropes=1,
        rope_size=HEAD_DIM // 2,
        buffers=buffers(qkv, qkv, out, out, out, out),
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )
    return step, [qkv, out, *tensors.values()]


def two_products(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """Attend with one query per head, the queries of a KV head as rows of a matrix."""
    scores = torch.matmul(q * HEAD_DIM**-0.5, kv[0].transpose(-1, -2))
    return torch.matmul(scores.softmax(-1), kv[1])


def sdpa(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """Attend with torch's own; the queries of a KV head are rows, or every head has its KV: never `enable_gqa`."""
    return functional.scaled_dot_product_attention(q, kv[0], kv[1], is_causal=q.shape[1] == HEADS)


def bench_linear(bench: Bench, threads: int, rows: list[int]) -> None:
    """Print the products."""
    for name in LINEARS:
        ways = Linears(name, threads)
        for num_rows in rows:
            x = torch.randn(num_rows, LINEARS[name][0])
            bench.run(f"{name} {LINEARS[name]}, {num_rows} rows", ways.kernels(x), ways.peers(x))


def bench_decode(bench: Bench, threads: int) -> None:
    """Print attention of one token per sequence."""
    for sequences, entries in DECODES:
        ways = Attention(sequences, entries, 1, threads)
        bench.run(f"decode, {sequences} x {entries} entries", {"attend": ways.kernel}, ways.peers)


def bench_prefill(bench: Bench, threads: int, has_slow: bool) -> None:  # noqa: FBT001 an option, as given
    """Print causal attention of whole prompts."""
    for tokens in PREFILLS:
        ways = Attention(1, tokens, tokens, threads)
        if tokens >= SLOW_BF16_TOKENS and not has_slow:
            del ways.peers["SDPA bf16"]
        bench.run(f"prefill, {tokens} tokens, one layer", {"attend": ways.kernel}, ways.peers)


def bench_small(bench: Bench, threads: int, rows: list[int]) -> None:
    """Print the normalised addition and the look-up, whose operands stay in the cache as in a step."""
    table = random_grid(VOCAB, HIDDEN)
    dense, panels = table.dequantise(), Panels(table)
    for num_rows in rows:
        small_ones(bench, threads, torch.randn(num_rows, HIDDEN), panels, dense)


def small_ones(bench: Bench, threads: int, x: torch.Tensor, panels: Panels, dense: torch.Tensor) -> None:
    """Print the small operations for as many rows as `x` has."""
    weight, norm, embed = torch.ones(HIDDEN), Program(), Program()
    for _ in range(SMALL_TOGETHER):
        norm.norm_add(Buffer.PROJECTED, Buffer.HIDDEN, weight, 1e-5)
        embed.embed(panels, Buffer.HIDDEN, 1.0)
    total, tokens = torch.zeros_like(x), torch.randint(VOCAB, (x.shape[0],))
    step = abi.Step(num_rows=x.shape[0], token_ids=tokens.data_ptr(), buffers=buffers(*[total] * 4, x, x))
    held = [x, total, tokens]
    norm_calls, embed_calls = (NativeCalls(each, step, held, threads) for each in (norm, embed))
    wanted = functional.rms_norm(x, (HIDDEN,), weight, 1e-5)
    norm_calls(1)
    check("norm_add", total, wanted)
    embed_calls(1)
    check("embed", total, functional.embedding(tokens, dense))
    size = float(x.numel())
    bench.run(
        f"norm and add, {x.shape[0]} rows",
        {"norm_add": (norm_calls, {"flops": 5 * size, "bytes": 8 * size})},
        {"F.rms_norm fp32": torch_calls(lambda t: t.add_(functional.rms_norm(x, (HIDDEN,), weight, 1e-5)), [total])},
    )
    bench.run(
        f"embed, {x.shape[0]} rows",
        {"embed int4": (embed_calls, {"flops": 2 * size, "bytes": size * 5 / 8})},
        {"F.embedding fp32": torch_calls(lambda ids: functional.embedding(ids, dense), [tokens])},
    )


PARTS = ("linear", "decode", "prefill", "small")


def main() -> None:
    """Measure the floors, then the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default=",".join(PARTS), help=f"of {', '.join(PARTS)}, with commas")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="of linear and small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slow-bf16", action="store_true", help="SDPA in bf16 over long prompts, too")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    parts = set(options.part.split(","))
    if not parts <= set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(parts - set(PARTS)))}")
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    rates = measure()
    print(
        f"{machine()}; {options.threads} threads; load {os.getloadavg()[0]:.1f}; commit {commit()}; "
        f"{datetime.datetime.now(tz=datetime.UTC).date()}; seed {options.seed}; {options.rounds} rounds; "
        f"torch {torch.__version__}\nfloors: {rates}"
    )
    bench = Bench(num_rounds=options.rounds, seed=options.seed, rates=rates, results=options.results)
    if "linear" in parts:
        bench_linear(bench, options.threads, options.rows)
    if "decode" in parts:
        bench_decode(bench, options.threads)
    if "prefill" in parts:
        bench_prefill(bench, options.threads, options.slow_bf16)
    if "small" in parts:
        bench_small(bench, options.threads, options.rows)
    print(f"floors at the end: {measure()}; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
