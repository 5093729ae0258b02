"""Fine-tune a causal language model on several devices: the example that README.md launches.

    accelerate launch --config_file benchmarks/distributed/ddp.yaml benchmarks/distributed/train.py \
        --model Qwen/Qwen3-8B --text corpus.txt --output_dir run --max_steps 1000

Without --model it trains a tiny random Llama on patterns, offline. All flags of transformers' TrainingArguments apply.
--resume_from_checkpoint FOLDER goes on, with any number of processes; but not with FSDP where it was without.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from dowser_peft import DowserConfig

_TINY = LlamaConfig(
    vocab_size=96,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=128,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


@dataclass
class ExampleArguments:
    """What the example adds to TrainingArguments."""

    model: str | None = field(default=None, metadata={"help": "Hub id or folder; default: a tiny random Llama."})
    text: str | None = field(default=None, metadata={"help": "Text file, a document a line; default: patterns."})
    length: int = field(default=64, metadata={"help": "Tokens of a training example."})
    dtype: str = field(default="bfloat16", metadata={"help": "Of the base; values are float32 over any."})
    rho: float = field(default=0.1, metadata={"help": "Fraction of the weights that train."})
    granularity: Literal["element", "column"] = field(default="element", metadata={"help": "What is chosen."})
    importance: str = field(
        default="dowser", metadata={"help": "'dowser' probes here; or the file of `dowser-peft probe`."}
    )
    num_prompts: int = field(default=64, metadata={"help": "N of the probe."})


def parse(argv: Sequence[str] | None = None) -> tuple[ExampleArguments, TrainingArguments]:
    """The arguments. They come first: TrainingArguments sets torch.distributed up."""
    parser = HfArgumentParser((ExampleArguments, TrainingArguments))  # type: ignore[arg-type]
    parser.set_defaults(learning_rate=1e-3)
    return parser.parse_args_into_dataclasses(argv)


def main(example: ExampleArguments, arguments: TrainingArguments) -> Trainer:
    base = base_model(example)
    checkpoint = arguments.resume_from_checkpoint
    if checkpoint is not None:
        model: Any = PeftModel.from_pretrained(base, checkpoint, is_trainable=True)  # probes nothing again
    else:
        config = DowserConfig(
            rho=example.rho,
            granularity=example.granularity,
            importance=example.importance,
            num_prompts=example.num_prompts,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(base, config)  # the processes share the probe
    data: Any = rows(example)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=default_data_collator)
    if checkpoint is not None:
        check_resumable(Path(checkpoint), trainer.is_fsdp_enabled)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()  # a plain adapter, whatever the weights were spread over
    if arguments.should_save:
        log = json.dumps(trainer.state.log_history, indent=1)
        Path(arguments.output_dir, "log.json").write_text(log, encoding="utf-8")
    return trainer


def check_resumable(checkpoint: Path, uses_fsdp: bool) -> None:
    """Refuse optimizer states of FSDP without FSDP, and the other way round: they name parameters differently.

    Raises:
        ValueError: with what can be done instead.
    """
    is_of_fsdp = any(path.name.startswith("pytorch_model_fsdp") for path in checkpoint.iterdir())
    if is_of_fsdp != uses_fsdp:
        with_or_not = "with", "without"
        raise ValueError(
            f"{checkpoint} is of a run {with_or_not[not is_of_fsdp]} FSDP and cannot be resumed "
            f"{with_or_not[is_of_fsdp]}. Launch as before; or begin a new run from its trained values, without the "
            "optimizer's state: PeftModel.from_pretrained(base, checkpoint, is_trainable=True)"
        )


def base_model(example: ExampleArguments) -> PreTrainedModel:
    dtype = getattr(torch, example.dtype)
    if example.model is not None:
        return AutoModelForCausalLM.from_pretrained(example.model, dtype=dtype)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(_TINY, dtype=dtype)


def rows(example: ExampleArguments) -> list[dict[str, list[int]]]:
    """Training examples of ``length`` tokens each."""
    if example.text is None:  # counting in steps that differ
        patterns = torch.arange(example.length)[None] * torch.arange(1, 65)[:, None] % 89 + 6
        return [{"input_ids": row, "labels": row} for row in patterns.tolist()]
    tokenizer = AutoTokenizer.from_pretrained(example.model)
    documents = Path(example.text).read_text(encoding="utf-8").splitlines()
    tokens = [token for text in documents if text for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    starts = range(0, len(tokens) - example.length + 1, example.length)
    chunks = [tokens[start : start + example.length] for start in starts]
    return [{"input_ids": chunk, "labels": chunk} for chunk in chunks]


if __name__ == "__main__":
    main(*parse())
