"""Speed and memory of the selection: this package's passes against the reference and the naive way.

    python -m benchmarks.speed.scoring --device auto

Every method in one process, interleaved, so that a busy machine slows all alike. Rows are appended to
results/scoring.jsonl. On a GPU, the whole decoder of a 7B model is timed as well, one layer at a time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from dowser_peft import bottom_rho_mask
from dowser_peft.scoring import num_trainable, reference

RESULTS = Path(__file__).parent / "results" / "scoring.jsonl"
SHAPES = [(512, 1408), (2048, 2048), (4096, 4096), (11008, 4096)]
DECODER_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
Method = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], Any]


def three_passes(weight: torch.Tensor, activation: torch.Tensor, sensitivity: torch.Tensor, rho: float) -> Any:
    return reference.bottom_k_mask(weight, activation, sensitivity, num_trainable(weight.numel(), rho))


def naive(weight: torch.Tensor, activation: torch.Tensor, sensitivity: torch.Tensor, rho: float) -> Any:
    """The full score matrix and its k-th value, as the authors do; a boolean mask."""
    score = weight.abs().float() * (sensitivity.T @ activation)
    return score <= score.view(-1).kthvalue(num_trainable(weight.numel(), rho)).values


METHODS: dict[str, Method] = {"dowser-peft": bottom_rho_mask, "three passes": three_passes, "kthvalue": naive}


def extra_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Peak memory of ``call`` above what was there, its result included; on a CPU, sampled resident memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # else earlier, freed memory hides what the call takes
    process, peak, done = psutil.Process(), 0, threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return max(0, peak - before)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def environment(device: torch.device) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rho", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    torch.manual_seed(0)
    # A decoder is timed layer by layer on one layer's weights, 32 times over: random weights are all alike.
    cases = [(f"{out}x{in_}", [(out, in_)], 1) for out, in_ in SHAPES]
    if device.type == "cuda":
        cases.append(("7B decoder", DECODER_7B, 32))
    rows = []
    for case, shapes, layers in cases:
        inputs = [
            (
                (torch.randn(shape, device=device) * 0.02).bfloat16(),
                torch.rand(args.prompts, shape[1], device=device) * torch.randn(shape[1], device=device).exp(),
                torch.rand(args.prompts, shape[0], device=device) * torch.randn(shape[0], device=device).exp(),
            )
            for shape in shapes
        ]
        weights = layers * sum(weight.numel() for weight, _, _ in inputs)

        def run(method: Method, inputs: Any = inputs, layers: int = layers) -> None:
            for _ in range(layers):
                for tensors in inputs:
                    method(*tensors, args.rho)

        memory = {label: extra_bytes(lambda m=method: run(m), device) for label, method in METHODS.items()}  # warms up
        times: dict[str, list[float]] = {label: [] for label in METHODS}
        for _ in range(args.repeats):
            for label, method in METHODS.items():
                times[label].append(seconds(lambda m=method: run(m), device))
        for label, values in times.items():
            low, *_, high = statistics.quantiles(values, n=5)
            rows.append(
                {
                    "benchmark": "scoring",
                    "method": label,
                    "case": case,
                    "weights": weights,
                    "dtype": "bfloat16",
                    "prompts": args.prompts,
                    "rho": args.rho,
                    "repeats": args.repeats,
                    "median_s": statistics.median(values),
                    "quantile20_s": low,
                    "quantile80_s": high,
                    "weights_per_s": weights / statistics.median(values),
                    "extra_bytes": memory[label],
                    **environment(device),
                }
            )
            print(f"{case:12} {label:14} {rows[-1]['weights_per_s'] / 1e6:8.1f} M/s  {memory[label] / 2**20:7.1f} MB")
    with RESULTS.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
