"""Training on several ranks equals training on one: DDP, FSDP2 and FSDP1, with the shipped example and configurations.

accelerate has no FSDP on a CPU. The environment is what `accelerate launch` makes of fsdp2.yaml; then the ranks are
made to look like those of GPUs, which is all that accelerate asks before it shards.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks.distributed import train
from dowser_peft import DowserConfig, importance, probe
from tests import models
from tests.distributed.launch import run_ranks
from tests.test_model import dowser_layers

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "benchmarks" / "distributed"
COMMON = [
    "--report_to",
    "none",
    "--use_cpu",
    "true",
    "--disable_tqdm",
    "true",
    "--logging_steps",
    "1",
    "--length",
    "16",
]
COMMON += ["--max_steps", "4", "--save_steps", "2", "--num_prompts", "5", "--gradient_checkpointing", "true"]
IDS = torch.arange(6, 26).view(2, 10)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of a model whose weights bfloat16 can hold, and in it statistics of its probe."""
    folder = tmp_path_factory.mktemp("base")
    model = train.base_model(train.ExampleArguments()).float()
    model.save_pretrained(folder)
    probe(model, num_prompts=5, num_probes=2, progress=False).save(folder / "statistics.safetensors")
    return str(folder)


@functools.cache
def environment_of(config: str) -> dict[str, str]:
    """What `accelerate launch` puts into the environment of the ranks."""
    before = dict(os.environ)
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / config), "train.py"])
    arguments, *_ = _validate_launch_command(arguments)
    return {name: value for name, value in prepare_multi_gpu_env(arguments).items() if before.get(name) != value}


def parsed(folder: Path, base: str, *options: str) -> Any:
    return train.parse([*COMMON, "--output_dir", str(folder), "--model", base, *options])


def run(folder: Path, base: str, *options: str) -> Any:
    """The example on one rank; what it trained, in facts that can be sent."""
    example, arguments = parsed(folder, base, *options)
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if sharded:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        arguments.distributed_state.distributed_type = DistributedType.MULTI_GPU
    resumes = arguments.resume_from_checkpoint is not None
    with patch.object(importance, "probe", None if resumes else importance.probe):  # never again
        trainer = train.main(example, arguments)
    model = trainer.model
    layer = next(iter(dowser_layers(model).values()))
    values, weight = layer.dowser_values["default"], layer.base_layer.weight
    facts = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "wrapper": type(trainer.model_wrapped).__name__,
        "dtypes": (values.dtype, weight.dtype),
        "sharded": isinstance(values, DTensor) and isinstance(weight, DTensor),
        "logits": model.eval()(input_ids=IDS).logits.detach(),
    }
    if isinstance(trainer.model_wrapped, DistributedDataParallel):
        facts["sent in every step"] = list(trainer.model_wrapped.named_module_buffers)
    if sharded:
        with pytest.raises(ValueError, match="has been sharded by fully_shard .FSDP2., but adapters are chosen from"):
            model.add_adapter("another", DowserConfig(importance="magnitude"))
    return facts


def several_ranks(
    config: str, folder: Path, base: str, *options: str, size: int = 2, environment: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    batch = ["--per_device_train_batch_size", str(8 // size)]
    return run_ranks(
        run, folder, base, *batch, *options, size=size, environment=environment_of(config) | (environment or {})
    )


def one_rank(folder: Path, base: str, *options: str) -> dict[str, Any]:
    return run(folder, base, "--per_device_train_batch_size", "8", *options)


def trained_values(folder: Path) -> torch.Tensor:
    """All values of a saved adapter, which are float32."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return torch.cat([tensor.flatten() for key, tensor in tensors.items() if key.endswith("dowser_values")])


def _distance(one: dict[str, Any], truth: dict[str, Any]) -> float:
    """Largest relative difference between the losses of two runs."""
    return max(abs(a / b - 1) for a, b in zip(one["losses"], truth["losses"], strict=True))


def assert_same_adapter(one: Path, other: Path) -> None:
    """Masks agree bit for bit, values up to rounding."""
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        if key.endswith("dowser_values"):
            assert tensor.dtype == theirs[key].dtype == torch.float32
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-3, atol=1e-6)
        else:
            assert torch.equal(tensor, theirs[key])


def test_ddp_equals_one_process_and_resumes_with_another_number_of_ranks(base: str, tmp_path: Path) -> None:
    one = one_rank(tmp_path / "one", base, "--dtype", "float32")
    two = several_ranks("ddp.yaml", tmp_path / "two", base, "--dtype", "float32")
    for rank in two:
        assert rank["wrapper"] == "DistributedDataParallel"
        assert not any("dowser" in name for name in rank["sent in every step"])
        assert rank["losses"] == pytest.approx(one["losses"], rel=1e-5)
        torch.testing.assert_close(rank["logits"], one["logits"])
    assert_same_adapter(tmp_path / "one", tmp_path / "two")

    checkpoint = ("--resume_from_checkpoint", str(tmp_path / "two" / "checkpoint-2"))
    one_rank(tmp_path / "two then one", base, "--dtype", "float32", *checkpoint)
    assert_same_adapter(tmp_path / "two", tmp_path / "two then one")
    checkpoint = ("--resume_from_checkpoint", str(tmp_path / "one" / "checkpoint-2"))
    resumed = several_ranks("ddp.yaml", tmp_path / "one then two", base, "--dtype", "float32", *checkpoint)
    assert not any("dowser" in name for name in resumed[0]["sent in every step"])
    assert_same_adapter(tmp_path / "one", tmp_path / "one then two")

    with pytest.raises(
        ValueError, match="checkpoint-2 is of a run without FSDP and cannot be resumed with. Launch as"
    ):
        train.check_resumable(tmp_path / "one" / "checkpoint-2", uses_fsdp=True)


@pytest.mark.parametrize("granularity", ["element", "column"])
def test_fsdp2_equals_one_process(granularity: str, base: str, tmp_path: Path) -> None:
    """A bfloat16 base that only the first rank loads, float32 values, gradient checkpointing."""
    # Not AdamW: a gradient that is all rounding would count there as much as any other.
    options = ("--granularity", granularity, "--optim", "sgd", "--learning_rate", "1")
    options += ("--importance", str(Path(base, "statistics.safetensors")))
    truth = one_rank(tmp_path / "truth", base, *options, "--dtype", "float32")
    one = one_rank(tmp_path / "one", base, *options)
    two = several_ranks("fsdp2.yaml", tmp_path / "two", base, *options)
    for rank in two:
        assert rank["wrapper"] == "FSDPPeftModelForCausalLM" and rank["sharded"]
        assert rank["dtypes"] == (torch.float32, torch.bfloat16)
        assert rank["losses"] == pytest.approx(truth["losses"], rel=max(2**-9, 1.5 * _distance(one, truth)))
    exact, rounded, found = (trained_values(tmp_path / run) for run in ("truth", "one", "two"))
    assert float((found - exact).norm()) <= 1.5 * float((rounded - exact).norm())
    assert float((rounded - exact).norm()) <= 0.05 * float(exact.norm())

    # What the first rank has written is a plain adapter.
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), tmp_path / "two"
    )
    assert torch.equal(model(IDS).logits, two[0]["logits"])


def test_fsdp2_resumes_with_any_number_of_ranks(base: str, tmp_path: Path) -> None:
    """Here with accelerate's activation checkpointing, which wraps the decoder layers and so changes their names."""
    options = ("--dtype", "float32", "--gradient_checkpointing", "false")
    wrapped = {"FSDP_ACTIVATION_CHECKPOINTING": "true"}
    two = several_ranks("fsdp2.yaml", tmp_path / "two", base, *options, environment=wrapped)
    options += ("--resume_from_checkpoint", str(tmp_path / "two" / "checkpoint-2"))
    resumed = several_ranks("fsdp2.yaml", tmp_path / "resumed", base, *options, environment=wrapped)
    assert resumed[0]["losses"] == two[0]["losses"]
    assert torch.equal(resumed[0]["logits"], two[0]["logits"])
    several_ranks("fsdp2.yaml", tmp_path / "on four", base, *options, size=4)
    assert_same_adapter(tmp_path / "two", tmp_path / "on four")
    one_rank(tmp_path / "one", base, "--dtype", "float32")
    assert_same_adapter(tmp_path / "one", tmp_path / "two")
    with pytest.raises(ValueError, match="checkpoint-2 is of a run with FSDP and cannot be resumed without. Launch"):
        one_rank(tmp_path / "no", base, *options)


def test_accelerate_launch(tmp_path: Path) -> None:
    """The command in README, as a process of its own."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "ddp.yaml")]
    script = ["--main_process_port", "0", str(CONFIGS / "train.py"), "--output_dir", str(tmp_path), *COMMON]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launch, *script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert PeftModel.from_pretrained(train.base_model(train.ExampleArguments()), tmp_path).peft_config["default"]


def under_fsdp1() -> dict[str, Any]:
    dist.init_process_group("gloo")

    def adapted(granularity: str, dtype: torch.dtype) -> nn.Module:
        config = DowserConfig(importance="magnitude", granularity=granularity)
        return get_peft_model(models.tiny_llama().to(dtype), config)

    def sharded(model: nn.Module) -> nn.Module:
        wrap = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(model, use_orig_params=True, auto_wrap_policy=wrap, device_id=cpu)

    def losses(model: nn.Module, ids: torch.Tensor) -> list[float]:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        found = []
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    found: dict[str, Any] = {}
    for granularity in ("element", "column"):
        one = losses(adapted(granularity, torch.float32), IDS)
        two = losses(sharded(adapted(granularity, torch.float32)), IDS[dist.get_rank()][None])
        found[granularity] = one, two
    with pytest.raises(ValueError, match="Must flatten tensors with uniform dtype"):
        sharded(adapted("element", torch.bfloat16))
    return found


def test_fsdp1_needs_a_base_in_the_dtype_of_the_values() -> None:
    first, second = run_ranks(under_fsdp1)
    for granularity, (one, losses) in first.items():
        mean = [(a + b) / 2 for a, b in zip(losses, second[granularity][1], strict=True)]
        assert mean == pytest.approx(one, rel=1e-5)
