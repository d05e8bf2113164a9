"""headrace against the servers that people run today: same machine, model, requests and minutes.

Every server runs every workload in every round, in an order that rotates; the others are stopped meanwhile.
"""

import argparse
import asyncio
import dataclasses
import datetime
import json
import signal
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from drive import Figures, drive
from floors import floor
from harness import commit, machine
from rates import Rates, measure
from servers import Headrace, LlamaServer, Server, Vllm, onnxruntime, openvino, transformers
from workloads import WORKLOADS, Workload

from headrace.cli.layout import bundled_model

FOLDER = Path(".peers")
CACHE = ("W4:burst", "W4:nothing-shared")
"""The same sizes with a prefix cache that helps and with one that cannot."""

Found: TypeAlias = dict[str, list[Figures]]
"""Figures of each server, round by round."""


def run(server: Server, workload: Workload, seed: int) -> Figures:
    """Run a workload once."""
    url = server.start(workload)
    try:
        return asyncio.run(drive(url, server.model, workload.asks(seed), workload.users))
    finally:
        server.pause()


def compare(workload: Workload, servers: Sequence[Server], rounds: int, seed: int) -> Found:
    """Return the figures of each server, round by round, after one run of each that counts for nothing."""
    found: Found = {server.name: [] for server in servers}
    for server in servers:
        run(server, dataclasses.replace(workload, draw=lambda rng: workload.draw(rng)[:1]), seed - 1)
    for index in range(rounds):
        turn = index % len(servers)
        for server in [*servers[turn:], *servers[:turn]]:
            found[server.name].append(run(server, workload, seed + index))
    return found


def floors_of(workload: Workload, rates: Rates, rounds: int, seed: int) -> list[float]:
    """Return the floor of each round's requests, on the file that headrace serves."""
    weights_bytes = bundled_model().stat().st_size
    return [floor(workload, workload.asks(seed + index), rates, weights_bytes) for index in range(rounds)]


def show(workload: Workload, found: Found, floors_s: Sequence[float]) -> None:
    """Print a row per server, with its ratio to the floor and that of the first one to it in the same rounds."""
    candidate = next(iter(found.values()))
    print(
        f"\n{workload.name} ({workload.figure}; median of {len(candidate)} rounds; "
        f"floor {statistics.median(floors_s):.4g} s)"
    )
    print(
        f"{'server':44} {'figure':>9} {'x floor':>7} {'TTFT p50/p95 s':>16} {'TPOT p50/p95 ms':>16} "
        f"{'tok/s':>7}  headrace/it"
    )
    for name, runs in found.items():
        figures = [getattr(each, workload.figure) for each in runs]
        ratios = [getattr(ours, workload.figure) / theirs for ours, theirs in zip(candidate, figures, strict=True)]
        above = statistics.median(each / least for each, least in zip(figures, floors_s, strict=True))
        middle = {
            field.name: statistics.median(getattr(each, field.name) for each in runs)
            for field in dataclasses.fields(Figures)
        }
        print(
            f"{name:44} {middle[workload.figure]:9.4f} {above:7.2f} "
            f"{middle['ttft_p50_s']:7.3f}/{middle['ttft_p95_s']:8.3f} "
            f"{1000 * middle['tpot_p50_s']:7.2f}/{1000 * middle['tpot_p95_s']:8.2f} {1 / middle['s_per_token']:7.1f}  "
            f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"
        )
    sys.stdout.flush()


def show_cache(found: dict[str, Found]) -> None:
    """Print how many times as long a burst takes each server when its prompts share nothing."""
    if not all(name in found for name in CACHE):
        return
    print("\nW4, time without a shared prefix over time with one (cache off / on; median of the rounds)")
    shared, apart = (found[name] for name in CACHE)
    for name, runs in shared.items():
        ratios = [off.total_s / on.total_s for on, off in zip(runs, apart[name], strict=True)]
        print(f"{name:44} {statistics.median(ratios):5.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
    sys.stdout.flush()


def servers_of(names: Sequence[str]) -> list[Server]:
    """Return servers by name, headrace first."""
    makers: dict[str, Callable[[], Server]] = {
        "headrace": Headrace,
        "headrace-int8": lambda: Headrace(dtype="int8"),
        "headrace-bf16": lambda: Headrace(dtype="bf16"),
        "llama": lambda: LlamaServer(FOLDER.absolute(), bundled_model()),
        "vllm": lambda: Vllm(FOLDER.absolute(), "float32"),
        "vllm-bf16": lambda: Vllm(FOLDER.absolute(), "bfloat16"),
        "openvino": lambda: openvino(FOLDER.absolute(), bundled_model()),
        "ort": lambda: onnxruntime(FOLDER.absolute(), "int4"),
        "ort-uint4": lambda: onnxruntime(FOLDER.absolute(), "uint4"),
        "transformers": lambda: transformers(FOLDER.absolute()),
    }
    if unknown := set(names) - set(makers):
        raise SystemExit(f"no such servers: {', '.join(sorted(unknown))}; there are {', '.join(makers)}")
    return [makers[name]() for name in names]


def main() -> None:
    """Compare and print; one line of JSON per workload goes to `--results`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", default="W1,W2@8,W2@32,W3:1024,W3:4096,W3:8000,W4:burst,W4:nothing-shared")
    parser.add_argument(
        "--servers",
        default="headrace,llama,vllm,openvino,ort,transformers",
        help="the first one is compared with the others",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    # As for Ctrl-C: a run that is ended must not leave peers behind, stopped for ever.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    servers = servers_of(options.servers.split(","))
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    rates = measure()
    print(f"{machine()}; commit {commit()}; {date}; seed {options.seed}")
    print(f"{rates} (all cores)")
    found: dict[str, Found] = {}
    try:
        for name in options.workloads.split(","):
            workload = WORKLOADS[name]
            found[name] = compare(workload, servers, options.rounds, options.seed)
            floors_s = floors_of(workload, rates, options.rounds, options.seed)
            show(workload, found[name], floors_s)
            if options.results is not None:
                rows = {server: [dataclasses.asdict(each) for each in runs] for server, runs in found[name].items()}
                line = {"workload": name, "machine": machine(), "commit": commit(), "date": date, "runs": rows}
                line |= {"rates": dataclasses.asdict(rates), "floors_s": floors_s}
                with options.results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
        show_cache(found)
    finally:
        for server in servers:
            server.stop()


if __name__ == "__main__":
    main()
