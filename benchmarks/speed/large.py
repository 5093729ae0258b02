"""A model in the shape of LLaVA-1.5-7B on a CPU machine with 24 GB: probe, select, one training step.

    python -m benchmarks.speed.large                     # all 32 layers, 14 GB of weights: needs 19 GB
    python -m benchmarks.speed.large --layers 2          # the same code in 2.5 GB

Weights are random bfloat16 numbers, written in place: no float32 copy of anything ever exists. Every phase reports its
seconds and the peak of the process's resident memory; the peak may exceed the weights by at most 5 GB. One row goes
to ``results/large.jsonl``, also when a phase fails, with its error.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import subprocess
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from peft import get_peft_model
from torch import nn
from transformers.initialization import no_init_weights

from benchmarks.speed.account import model_config
from dowser_peft import DowserConfig, probe
from dowser_peft.importance import select_masks
from dowser_peft.targets import default_targets

RESULTS = Path(__file__).parent / "results" / "large.jsonl"
ALLOWED_BYTES = 5 * 10**9  # over the weights
_PERIOD = 4_194_301  # prime, so that no two rows of a weight are equal
_STD = 0.02


def random_llava(layers: int) -> Any:
    """LLaVA-1.5-7B with ``layers`` decoder layers, frozen, bfloat16, in eval mode."""
    config: Any = model_config("llava-1.5-7b")
    config.text_config.num_hidden_layers = layers
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model: Any = transformers.LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    fill_in_place(model)
    return model.requires_grad_(False).eval()


def fill_in_place(model: nn.Module) -> None:
    """Give every parameter on the meta device memory and normal numbers; norms get ones.

    One block of normals is repeated: copying runs at the speed of memory, drawing 7e9 normals takes minutes.
    """
    block = torch.randn(_PERIOD, generator=torch.Generator().manual_seed(0)).mul_(_STD).bfloat16()
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            data = torch.empty(parameter.shape, dtype=parameter.dtype)
            flat = data.view(-1)
            if data.ndim == 1:
                flat.fill_(float("norm" in type(module).__name__.lower()))
            else:
                for start in range(0, flat.numel(), _PERIOD):
                    flat[start : start + _PERIOD] = block[: flat.numel() - start]
            module._parameters[name] = nn.Parameter(data, requires_grad=False)


class Phases:
    """Seconds and peak resident memory of each phase; stops at the first that fails."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.error: str | None = None

    def run(self, name: str, action: Callable[[], Any]) -> Any:
        """The result of ``action``, or None after an error (here or earlier), which is kept."""
        if self.error is not None:
            return None
        gc.collect()
        reset_peak()
        started = time.perf_counter()
        result = None
        try:
            result = action()
        except Exception as error:
            traceback.print_exc()
            self.error = f"{name}: {type(error).__name__}: {error}"
        row = {
            "phase": name,
            "seconds": round(time.perf_counter() - started, 2),
            "peak_rss_bytes": memory("VmHWM"),
            "rss_bytes": memory("VmRSS"),
        }
        self.rows.append(row)
        peak, rss = (row[key] / 1e9 for key in ("peak_rss_bytes", "rss_bytes"))
        print(f"{name:<10} {row['seconds']:8.1f} s   peak {peak:6.2f} GB   then {rss:6.2f} GB", flush=True)
        return result


def memory(field: str) -> int:
    """Bytes of a field of ``/proc/self/status``: VmRSS (resident now) or VmHWM (its peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def reset_peak() -> None:
    """Let VmHWM start again from the present."""
    Path("/proc/self/clear_refs").write_text("5")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All phases of one run, as a row."""
    torch.manual_seed(0)
    phases = Phases()
    model = phases.run("build", lambda: random_llava(options.layers))
    weights = 0 if model is None else sum(parameter.nbytes for parameter in model.parameters())
    names = [] if model is None else default_targets(model)
    statistics = phases.run(
        "probe",
        lambda: probe(
            model,
            num_prompts=options.num_prompts,
            num_probes=options.num_probes,
            prompt_length=options.prompt_length,
            target_modules=names,
        ),
    )

    def select() -> int:
        masks = select_masks(model, DowserConfig(rho=options.rho, importance=statistics), names)
        return sum(mask.nbytes for mask in masks.values())

    mask_bytes = phases.run("select", select)
    last = min(options.trained_layers, options.layers)
    adapted = phases.run(
        "adapt",
        lambda: get_peft_model(model, DowserConfig(rho=options.rho, num_last_layers=last, importance=statistics)),
    )
    loss = phases.run("step", lambda: training_step(model, adapted, options.tokens))
    peak = max(row["peak_rss_bytes"] for row in phases.rows)
    return {
        "layers": options.layers,
        "trained_layers": last,
        "rho": options.rho,
        "num_prompts": options.num_prompts,
        "num_probes": options.num_probes,
        "prompt_length": options.prompt_length,
        "tokens": options.tokens,
        "weight_bytes": weights,
        "target_modules": len(names),
        "mask_bytes": mask_bytes,
        "loss": loss,
        "phases": phases.rows,
        "peak_over_weights_bytes": peak - weights,
        "within_limit": phases.error is None and peak - weights <= ALLOWED_BYTES,
        "error": phases.error,
    }


def training_step(model: Any, adapted: Any, tokens: int) -> float:
    """Forward, backward and one step of AdamW on one sequence, with gradient checkpointing; the loss."""
    adapted.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([parameter for parameter in adapted.parameters() if parameter.requires_grad])
    ids = torch.randint(3, 32000, (1, tokens))
    loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="decoder layers of the model")
    parser.add_argument("--trained-layers", type=int, default=2, help="num_last_layers of the training step")
    parser.add_argument("--rho", type=float, default=0.1)
    parser.add_argument("--num-prompts", type=int, default=4)
    parser.add_argument("--num-probes", type=int, default=2)
    parser.add_argument("--prompt-length", type=int, default=16, help="each token but the first few reads all weights")
    parser.add_argument("--tokens", type=int, default=64, help="of the training step")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    row = run(options)
    row |= {
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("dowser-peft", "peft", "torch", "transformers")},
        "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    over = row["peak_over_weights_bytes"] / 1e9
    print(f"weights {row['weight_bytes'] / 1e9:.2f} GB, peak {over:+.2f} GB over them (allowed +5.00)")
    if row["error"]:
        raise SystemExit(row["error"])


if __name__ == "__main__":
    main()
