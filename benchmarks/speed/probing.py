"""Time from a bare model to its masks: the authors' procedure, the paper's fixed N and R, and the adaptive stop.

    python -m benchmarks.speed.probing --shapes 10m 33m 100m
    python -m benchmarks.speed.probing --shapes 7b --dtype bfloat16 --authors-iterations 4      # on a GPU

All work on the same model and the same prompts in one process. Writing the prompts is common to all: each time is
given with it and without it (the time spent in ``generate``). The authors' procedure does N / 4 * R equal iterations;
its time is that of some of them, after one to warm up, scaled to all (``timed_share`` says how many were timed).

The adaptive stop gets the tolerance at which its mask is as good as that of fixed N and R: the mask error that it
would predict of their statistics (``--tolerance`` sets another).

With ``--reference``, files of much larger probes of the same shape with other seeds (``--write-reference``), the mask
error of each method is measured too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.authors import BATCH_SIZE, AuthorsProbe
from benchmarks.speed.common import Results, Row, add_arguments, choose_device, quantiles
from benchmarks.speed.convergence import joined, mask_error, masks, predicted_error, weights
from benchmarks.speed.shapes import SHAPES, build_llama
from dowser_peft import ProbeStatistics, bitmask, probe
from dowser_peft.model_probe import sampled_weights
from dowser_peft.probing import StoppingRule
from dowser_peft.targets import default_targets

NUM_PROMPTS, NUM_PROBES, TOKENS, RHO = 64, 8, 64, 0.1


class Generation:
    """Watches ``model.generate``: the seconds spent in it, and what it wrote."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._generate, self._device = model.generate, device
        self.seconds = 0.0
        model.generate = self

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        written, seconds = timed(lambda: self._generate(*args, **kwargs), self._device)
        self.seconds += seconds
        return written


def timed(action: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What ``action`` returns, and its seconds, waiting for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    result = action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - started


def measure_shape(
    shape: str,
    device: torch.device,
    dtype: torch.dtype,
    tolerance: float | None,
    iterations: int,
    references: list[Path],
) -> list[Row]:
    """Rows of one model."""
    model = build_llama(SHAPES[shape], device, dtype).eval()
    modules = {name: model.get_submodule(name) for name in default_targets(model)}
    weight = weights(modules)
    converged = None
    if references:
        converged = masks(weight, joined([ProbeStatistics.load(path) for path in references]), RHO)
    probe(model, num_prompts=BATCH_SIZE, num_probes=1, prompt_length=TOKENS, progress=False)  # to warm up
    generation = Generation(model, device)
    rows: list[Row] = []

    def add(method: str, seconds: float, generated: float, found: dict[str, torch.Tensor] | None, **more: Any) -> None:
        error = None if found is None or converged is None else mask_error(found, converged)
        for metric, value in (("with prompts", seconds), ("without prompts", seconds - generated)):
            rows.append({"method": method, "metric": metric, "unit": "s", **quantiles([value]), **more})
            rows[-1] |= {"mask_error": error}
        print(f"{method}: {seconds:.1f} s, of it prompts {generated:.1f} s; error {error}; {more}", flush=True)

    seen: list[torch.Tensor] = []
    model.model.register_forward_pre_hook(lambda _module, _args, kwargs: _keep(seen, kwargs), with_kwargs=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    options = {"prompt_length": TOKENS, "seed": 0, "progress": False}

    def run(**chosen: Any) -> tuple[ProbeStatistics, dict[str, torch.Tensor]]:
        statistics = probe(model, num_prompts=NUM_PROMPTS, num_probes=NUM_PROBES, **chosen, **options)
        return statistics, masks(weight, statistics, RHO)

    (statistics, found), seconds = timed(run, device)
    prompts = torch.cat(seen)
    common = generation.seconds
    more: dict[str, Any] = {"peak_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
    predicted = predicted_error(StoppingRule(0.0, RHO, sampled_weights(modules)), statistics)
    more |= {"num_prompts": NUM_PROMPTS, "num_probes": NUM_PROBES, "predicted": predicted}
    add("fixed", seconds, common, found, **more)

    generation.seconds = 0.0
    tolerance = tolerance or predicted
    (statistics, found), seconds = timed(lambda: run(tolerance=tolerance), device)
    add(
        "adaptive",
        seconds,
        generation.seconds,
        found,
        num_prompts=statistics.num_prompts,
        num_probes=statistics.num_probes,
        tolerance=tolerance,
        predicted=statistics.mask_error,
    )

    torch.manual_seed(0)
    authors = AuthorsProbe(model, list(weight))
    batches = prompts.split(BATCH_SIZE)
    total = len(batches) * NUM_PROBES
    iterations = min(iterations, total)
    timed_share = iterations / total
    if timed_share < 1.0:
        authors.iterate(batches[-1])
    _, seconds = timed(lambda: [authors.iterate(batches[i // NUM_PROBES]) for i in range(iterations)], device)
    chosen, selecting = timed(lambda: authors.masks(RHO), device)
    seconds = seconds / timed_share + selecting
    found = {name: bitmask.pack(mask.flatten()) for name, mask in chosen.items()} if timed_share == 1.0 else None
    numbers = {"num_prompts": NUM_PROMPTS, "num_probes": NUM_PROBES, "timed_share": timed_share}
    add("authors", common + seconds, common, found, **numbers)
    return rows


def _keep(seen: list[torch.Tensor], kwargs: dict[str, Any]) -> None:
    """Remember the prompts that are probed; with gradients, once each."""
    if torch.is_grad_enabled() and sum(map(len, seen)) < NUM_PROMPTS:
        seen.append(kwargs["input_ids"].clone())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser, "probing.jsonl")
    parser.add_argument("--shapes", nargs="+", default=["10m", "33m", "100m"], choices=SHAPES)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tolerance", type=float, help="of the adaptive stop; default: as good as fixed N and R")
    parser.add_argument("--authors-iterations", type=int, default=NUM_PROMPTS // BATCH_SIZE * NUM_PROBES)
    parser.add_argument("--reference", type=Path, nargs="+", default=[], help="files of converged probes of the shape")
    parser.add_argument("--write-reference", type=Path, help="write such a file of the first shape, and end")
    parser.add_argument("--seed", type=int, default=1, help="of --write-reference")
    parser.add_argument("--prompts", type=int, default=192, help="N of --write-reference")
    parser.add_argument("--probes", type=int, default=NUM_PROBES, help="R of --write-reference")
    arguments = parser.parse_args()
    device, dtype = choose_device(arguments.device), getattr(torch, arguments.dtype)
    if arguments.write_reference is not None:
        model = build_llama(SHAPES[arguments.shapes[0]], device, dtype)
        size = {"num_prompts": arguments.prompts, "num_probes": arguments.probes, "prompt_length": TOKENS}
        probe(model, **size, seed=arguments.seed).save(arguments.write_reference)
        return
    results = Results(arguments.out, device, fresh=arguments.fresh)
    for shape in arguments.shapes:
        configuration = {"shape": shape, "dtype": arguments.dtype, "tokens": TOKENS, "rho": RHO}
        if not results.is_finished("probing", configuration):
            rows = measure_shape(
                shape, device, dtype, arguments.tolerance, arguments.authors_iterations, arguments.reference
            )
            results.add("probing", configuration, rows)


if __name__ == "__main__":
    main()
