"""What adapters on fused experts keep in memory, and how large their statistics are.

    python -m benchmarks.speed.experts

A mixture in the shape of Mixtral, scaled down, makes one forward and one backward pass over its experts in training.
*Kept* are the bytes that are alive between the two, beside the model: activations, and whatever a method keeps to
get from the gradient of a weight to that of its values. *Peak* is the most that is alive at once in the step.
"Dowser, keeping its weights" is Dowser inside another pair of saved tensor hooks, in which it does not rebuild; so do
the effective weights of PEFT's LoRA on parameters stay.

Statistics are counted on the meta device, from the parameters that are adapted by default: bytes in bfloat16.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

from benchmarks.speed.common import RESULTS, Results, Row, peak_memory, quantiles
from benchmarks.speed.storage_tracker import StorageTracker
from dowser_peft import DowserConfig
from dowser_peft.fused_experts import fused_weights
from dowser_peft.targets import default_parameters

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
NUM_PROMPTS = 64
KEEPING = "Dowser, keeping its weights"
METHODS = ["frozen experts", "Dowser", KEEPING, "LoRA on parameters"]
SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}
SMALL = SHAPE | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128}
# Shapes of published models, as their configurations state them.
PUBLISHED: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "Mixtral 8x7B": lambda: transformers.MixtralConfig(num_key_value_heads=8),
    "Qwen3-30B-A3B": lambda: transformers.Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
    ),
}


def adapted(method: str, shape: dict[str, Any]) -> Any:
    """The mixture in training, its embeddings passing gradients on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape))
    config: Any = None
    if method.startswith("Dowser"):
        config = DowserConfig(importance="random", target_modules=[], target_parameters=PARAMETERS)
    elif method == "LoRA on parameters":
        config = LoraConfig(r=16, target_modules=[], target_parameters=PARAMETERS)
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return (model if config is None else get_peft_model(model, config)).train()


@contextmanager
def _other_hooks() -> Iterator[None]:
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        yield


def training_pass(
    method: str, shape: dict[str, Any], tokens: int, checkpointing: bool
) -> tuple[Any, Callable[[], Any]]:
    """A model whose gradients and indices are there, and its forward pass to the loss."""
    ids = torch.randint(shape["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(0))
    hooks = _other_hooks if method == KEEPING else nullcontext
    model = adapted(method, shape)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward() -> torch.Tensor:
        with hooks():
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    forward().backward()
    return model, forward


def kept_bytes(forward: Callable[[], Any]) -> int:
    """Bytes that are alive between forward and backward."""
    gc.collect()
    with StorageTracker() as tracker:
        loss = forward()
        gc.collect()
        kept = tracker.live_bytes
    loss.backward()
    return kept


def measure(shape: dict[str, Any], tokens: int, checkpointing: bool) -> list[Row]:
    """Rows of every method."""
    rows: list[Row] = []
    for method in METHODS:
        if checkpointing and method == KEEPING:
            continue  # in the hooks of a checkpoint nothing is rebuilt anyway
        model, forward = training_pass(method, shape, tokens, checkpointing)
        memory = peak_memory(lambda forward=forward: lambda: forward().backward(), torch.device("cpu"))
        more = {
            "expert_bytes": expert_bytes(model),
            "trained_weights": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
        for metric, value in (("kept", kept_bytes(forward)), ("peak", memory.peak - memory.before)):
            rows.append({"method": method, "metric": metric, "unit": "bytes", **quantiles([value]), **more})
    return rows


def expert_bytes(model: Any) -> int:
    """Bytes of all fused parameters."""
    return sum(weight.parameter.nbytes for _, weight in fused_weights(model))


def statistics_bytes(config: transformers.PretrainedConfig) -> dict[str, int]:
    """Bytes of the statistics of all experts, of a probe with 64 prompts in bfloat16, and of the model itself."""
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fused = dict(fused_weights(model))
    experts = [fused[name].expert_shape for name in default_parameters(model) for _ in range(fused[name].num_experts)]
    return {
        "experts": 2 * NUM_PROMPTS * sum(map(sum, experts)),
        "model": sum(parameter.nbytes for parameter in model.parameters()),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a shape that takes a second")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--out", type=Path, default=RESULTS / "experts.jsonl")
    options = parser.parse_args(arguments)
    shape = SMALL if options.small else SHAPE
    results = Results(options.out, torch.device("cpu"))
    for checkpointing in (False, True):
        configuration = {"shape": shape, "tokens": options.tokens, "checkpointing": checkpointing}
        if not results.is_finished("experts", configuration):
            for row in results.add("experts", configuration, measure(shape, options.tokens, checkpointing)):
                print(f"checkpointing {checkpointing}, {row['method']}: {row['metric']} {row['median'] / 1e6:.1f} MB")
    for name, config in PUBLISHED.items():
        configuration = {"model": name, "num_prompts": NUM_PROMPTS}
        if not results.is_finished("experts", configuration):
            found = statistics_bytes(config())
            rows = [
                {"method": part, "metric": "statistics", "unit": "bytes", **quantiles([n])}
                for part, n in found.items()
            ]
            for row in results.add("experts", configuration, rows):
                print(f"{name}, {row['method']}: {row['median'] / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
