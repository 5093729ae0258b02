"""DeepSpeed ZeRO-3 on two CPU processes: every weight and every value is partitioned, and nothing else changes.

Jobs run in processes of their own; what they return is compared with one process that never saw DeepSpeed.
"""

from __future__ import annotations

import gc
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from dowser_peft import DowserConfig, probe
from dowser_peft.partitioned import gathered, is_partitioned
from tests.distributed.launch import run_ranks
from tests.models import tiny_llama
from tests.test_model import dowser_layers

pytest.importorskip("deepspeed", reason="DeepSpeed is for Linux alone")

CPU = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}  # accelerate takes that for plain DDP
CONFIGURATION = Path(__file__).parents[2] / "benchmarks" / "distributed" / "zero3.yaml"
FILE = "adapter_model.safetensors"
GRANULARITIES = ("element", "column")
STEPS, MIDDLE, BATCH = 3, 2, 8
TIMEOUT_S = 600.0  # of half a minute of work, on cores that others use too
PROBE = {"num_prompts": 5, "num_probes": 3, "prompt_length": 12}
DATA = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(6, 96, (STEPS * BATCH, 8), generator=torch.Generator().manual_seed(0))
]
ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # small weights as well
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}},
    "gradient_clipping": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
}
ENGINE = {
    "zero_optimization": ZERO3["zero_optimization"],
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "train_micro_batch_size_per_gpu": 1,
}


def arguments(folder: Path, *, zero3: bool, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        per_device_train_batch_size=BATCH // 2 if zero3 else BATCH,
        deepspeed=ZERO3 if zero3 else None,
        **common_arguments(folder) | options,
    )


def common_arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "save_steps": MIDDLE,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapted(granularity: Any, dtype: torch.dtype = torch.float32, four_bit: Path | None = None) -> Any:
    """A new adapter on the tiny Llama, or on the base at ``four_bit``, quantised."""
    base: nn.Module = tiny_llama().to(dtype)
    if four_bit is not None:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        base = AutoModelForCausalLM.from_pretrained(four_bit, quantization_config=quantisation, dtype=torch.float32)
    return get_peft_model(base, DowserConfig(importance="magnitude", granularity=granularity))


def train(model: nn.Module, folder: Path, *, zero3: bool, resume: bool = False, **options: Any) -> Trainer:
    trainer = Trainer(model=model, args=arguments(folder, zero3=zero3, **options), train_dataset=DATA)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.stack([row["input_ids"] for row in DATA[:4]])).logits.float()


def start() -> None:
    """DeepSpeed as it is without a compiler: it would build its own all_reduce for CPUs, for minutes."""
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def next_model() -> None:
    """Forget the training stack of the model before."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    gc.collect()


CASES: dict[str, dict[str, Any]] = {
    "element": {"granularity": "element"},
    "column": {"granularity": "column"},
    "element, checkpointing": {"granularity": "element", "gradient_checkpointing": True},
    "column, checkpointing": {"granularity": "column", "gradient_checkpointing": True},
    "element, bfloat16 base": {"granularity": "element", "dtype": torch.bfloat16},
    "element, 4-bit base": {"granularity": "element", "four_bit": "base"},
}


def train_case(folder: Path, bases: Path, zero3: bool, **options: Any) -> dict[str, Any]:
    checkpointing = options.pop("gradient_checkpointing", False)
    if "four_bit" in options:
        options["four_bit"] = bases / options["four_bit"]
    model = adapted(**options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = train(model, folder, zero3=zero3, gradient_checkpointing=checkpointing)
    return {
        "losses": losses(trainer),
        "warnings": [str(warning.message) for warning in caught if "Dowser" in str(warning.message)],
        "left": sum(p.numel() for p in model.parameters()),
        "output": output(model),
    }


def train_all(folder: Path) -> dict[str, Any]:
    start()
    found = {}
    for case, options in CASES.items():
        found[case] = train_case(folder / case, folder, True, **options)
        next_model()
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("zero3")
    tiny_llama(hidden_size=64, intermediate_size=128, head_dim=32).save_pretrained(folder / "base")
    return folder, run_ranks(train_all, folder, environment=CPU, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case: str, trained: Any, tmp_path: Path) -> None:
    folder, ranks = trained
    alone = train_case(tmp_path, folder, False, **CASES[case])
    rough = "bfloat16" in case
    for rank in ranks:
        assert rank[case]["losses"] == pytest.approx(alone["losses"], rel=1e-3 if rough else 1e-5)
        assert rank[case]["warnings"] == []
        assert rank[case]["left"] == 0  # all were partitioned, and are again

    file = f"checkpoint-{STEPS}/{FILE}"
    saved, expected = load_file(folder / case / file), load_file(tmp_path / file)
    assert saved.keys() == expected.keys()
    assert any(bool(value.any()) for key, value in saved.items() if "dowser_values" in key)
    for key, value in saved.items():
        assert value.dtype == expected[key].dtype
        tolerance = 0.0 if "dowser_values" not in key else 1e-2 if rough else 1e-4
        torch.testing.assert_close(value, expected[key], rtol=0, atol=tolerance)
        if "dowser_values" in key:  # nothing was rounded to 16 bits on the way
            assert not torch.equal(value, value.bfloat16().float())


@pytest.mark.parametrize("case", ["element", "column"])
def test_the_saved_adapter_is_a_plain_one(case: str, trained: Any) -> None:
    folder, ranks = trained
    loaded = PeftModel.from_pretrained(tiny_llama(), folder / case / f"checkpoint-{STEPS}")
    for rank in ranks:
        torch.testing.assert_close(output(loaded), rank[case]["output"], rtol=0, atol=1e-5)


def resume_and_merge(folder: Path) -> dict[str, Any]:
    """Continue from the checkpoint in the middle; then merge, and take it back."""
    start()
    found = {}
    for granularity in GRANULARITIES:
        checkpoint = folder / granularity / f"checkpoint-{MIDDLE}"
        model = PeftModel.from_pretrained(tiny_llama(), checkpoint, is_trainable=True)
        options = arguments(folder / "resumed" / granularity, zero3=True)
        Trainer(model=model, args=options, train_dataset=DATA).train(resume_from_checkpoint=str(checkpoint))
        model.merge_adapter()
        merged = base_weights(model)
        model.unmerge_adapter()
        found[granularity] = {"merged": merged, "unmerged": base_weights(model)}
        next_model()
    return found


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, layer in dowser_layers(model).items():
        with gathered([layer.base_layer.weight]):
            found[name] = layer.base_layer.weight.detach().clone()
    return found


@pytest.fixture(scope="module")
def resumed(trained: Any) -> list[Any]:
    return run_ranks(resume_and_merge, trained[0], environment=CPU, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_resuming_and_merging(granularity: str, trained: Any, resumed: Any) -> None:
    folder, _ = trained
    last = f"{granularity}/checkpoint-{STEPS}"
    whole, again = (load_file(at / last / FILE) for at in (folder, folder / "resumed"))
    assert all(torch.equal(value, again[key]) for key, value in whole.items())

    model = PeftModel.from_pretrained(tiny_llama(), folder / "resumed" / last)
    original = base_weights(model)
    model.merge_adapter()
    for rank in resumed:
        for name, weight in base_weights(model).items():
            assert torch.equal(rank[granularity]["merged"][name], weight)
            assert torch.equal(rank[granularity]["unmerged"][name], original[name])
            assert not torch.equal(weight, original[name])


def probe_partitioned(base: Path, folder: Path) -> dict[str, Any]:
    """A base that transformers partitions while it loads it: probed, adapted and trained."""
    start()
    options = arguments(folder, zero3=True)  # from here on transformers loads models in parts
    model = AutoModelForCausalLM.from_pretrained(base)
    found: dict[str, Any] = {"loaded": sum(p.numel() for p in model.parameters())}
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    kept: list[StorageWeakRef] = []
    found["kept"], found["live"] = [], []

    def watch(module: nn.Module, args: Any, y: torch.Tensor) -> None:
        found["live"].append(sum(p.numel() > 0 for p in model.parameters()))
        if y.requires_grad:
            kept.append(StorageWeakRef(module.weight.untyped_storage()))
            y.register_hook(lambda gradient: found["kept"].append(sum(not ref.expired() for ref in kept)))

    hooks = [module.register_forward_hook(watch) for module in linear.values()]
    statistics = probe(model, **PROBE)
    for hook in hooks:
        hook.remove()
    found["backward passes"] = len(kept)
    found["activations"], found["sensitivities"] = statistics.activations, statistics.sensitivities
    found["fingerprint"] = statistics.fingerprint
    adapted = get_peft_model(model, DowserConfig(importance=statistics))
    found["masks"] = {name: layer.dowser_mask["default"] for name, layer in dowser_layers(adapted).items()}
    found["left"] = sum(p.numel() for n, p in adapted.named_parameters() if "dowser_" not in n)
    trainer = Trainer(model=adapted, args=options, train_dataset=DATA)
    trainer.train()
    found["losses"] = losses(trainer)
    return found


def test_a_partitioned_base_is_probed_one_layer_at_a_time(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    ranks = run_ranks(probe_partitioned, tmp_path / "base", tmp_path / "run", environment=CPU, timeout_s=TIMEOUT_S)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = probe(model, **PROBE)
    model = get_peft_model(model, DowserConfig(importance=expected))
    alone = train(model, tmp_path / "alone", zero3=False)
    for rank in ranks:
        assert rank["loaded"] == rank["left"] == 0
        assert max(rank["live"]) == 1  # a projection without bias
        assert rank["backward passes"] > 0 and set(rank["kept"]) == {0}  # no weight lives until the backward pass
        assert rank["fingerprint"] == expected.fingerprint
        for kind in ("activations", "sensitivities"):
            for name, value in getattr(expected, kind).items():
                torch.testing.assert_close(rank[kind][name], value, rtol=2**-7, atol=0)  # one step of bfloat16
        for name, layer in dowser_layers(model).items():
            assert torch.equal(rank["masks"][name], layer.dowser_mask["default"])
        assert rank["losses"] == pytest.approx(losses(alone), rel=1e-5)


def shipped_environment() -> dict[str, str]:
    """What `accelerate launch --config_file zero3.yaml` puts into the environment of each process."""
    asked = launch_command_parser().parse_args(["--config_file", str(CONFIGURATION), "train.py"])
    asked, *_ = _validate_launch_command(asked)
    asked.deepspeed_fields_from_accelerate_config = ""
    before = dict(os.environ)
    _, environment = prepare_deepspeed_cmd_env(asked)
    return {name: value for name, value in environment.items() if before.get(name) != value}


def train_as_shipped(base: Path, folder: Path) -> dict[str, Any]:
    start()
    options = TrainingArguments(**common_arguments(folder), per_device_train_batch_size=BATCH // 2)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    managed = all(is_partitioned(p) for p in model.parameters())
    model = get_peft_model(model, DowserConfig(importance="magnitude"))
    trainer = Trainer(model=model, args=options, train_dataset=DATA)
    trainer.train()
    trainer.save_model()
    return {"managed": managed, "losses": losses(trainer)}


def test_the_shipped_configuration(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    environment = shipped_environment() | CPU
    ranks = run_ranks(
        train_as_shipped, tmp_path / "base", tmp_path / "run", environment=environment, timeout_s=TIMEOUT_S
    )
    alone = train_case(tmp_path / "alone", tmp_path, False, granularity="element", dtype=torch.bfloat16)
    for rank in ranks:
        assert rank["managed"]
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-3)
    values = {key: value for key, value in load_file(tmp_path / "run" / FILE).items() if "dowser_values" in key}
    assert values and not any(torch.equal(value, value.bfloat16().float()) for value in values.values())


def without_engine_forward() -> list[dict[str, Any]]:
    """The model as such, under an engine that has not run it yet; and what is refused."""
    import deepspeed

    start()
    results = []
    for granularity in GRANULARITIES:
        options = DowserConfig(importance="magnitude", granularity=granularity, init_weights=False)
        model = get_peft_model(tiny_llama(), options)
        found: dict[str, Any] = {"before": output(model)}
        trained = [p for p in model.parameters() if p.requires_grad]
        engine, *_ = deepspeed.initialize(model=model, config=ENGINE, model_parameters=trained)
        found |= {"after": output(model), "again": output(model)}
        row = DATA[0]["input_ids"][None]
        engine.backward(engine(input_ids=row, labels=row).loss)
        engine.step()
        found["left"] = sum(p.numel() for p in model.parameters())
        with pytest.raises(ValueError, match="before the model goes to the Trainer"):
            probe(model)
        with pytest.raises(ValueError, match="would neither train nor partition"):
            model.add_adapter("late", DowserConfig(importance="magnitude", granularity=granularity))
        assert list(model.peft_config) == ["default"]
        try:
            model.save_pretrained("/nowhere")
        except ValueError as error:
            found["refusal"] = str(error)
        except OSError:
            found["refusal"] = ""
        results.append(found)
    return results


def test_the_model_without_its_engine() -> None:
    for first, second in zip(*run_ranks(without_engine_forward, environment=CPU, timeout_s=TIMEOUT_S), strict=True):
        for rank in (first, second):
            torch.testing.assert_close(rank["after"], rank["before"], rtol=0, atol=1e-5)
            assert torch.equal(rank["again"], rank["after"])
            assert rank["left"] == 0
        assert "trainer.save_model()" in first["refusal"]
