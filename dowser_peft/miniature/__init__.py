"""A LLaVA small enough to ship inside the package, for the demo and the forgetting benchmark.

Forgetting can only be measured on a model that knows something. This one has three million
parameters, was pretrained within an hour on one CPU core by ``benchmarks/forgetting/pretrain.py``
and can do fourteen small things well: read handwritten digits, name, size, place and count drawn
shapes, copy, reverse, sort and compare, count on, and recall facts about animals.

    model, tokenizer = load_miniature()
    evaluate(model, tokenizer, UPSTREAM)                       # what it knows
    fine_tune(model, tokenizer, "rename", steps=300, lr=1e-3)  # teach it new names for shapes
    evaluate(model, tokenizer, UPSTREAM)                       # what it still knows

It is an ordinary ``LlavaForConditionalGeneration`` loaded by an ordinary ``from_pretrained``, so
the same lines work after ``get_peft_model``. Weights are stored in bfloat16 and loaded in float32.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from dowser_peft.miniature.tasks import DOWNSTREAM, TASKS, UPSTREAM, Example, examples
from dowser_peft.miniature.training import collate, evaluate, fine_tune

CHECKPOINT = Path(__file__).parent / "checkpoint"

__all__ = [
    "CHECKPOINT",
    "DOWNSTREAM",
    "TASKS",
    "UPSTREAM",
    "Example",
    "collate",
    "evaluate",
    "examples",
    "fine_tune",
    "load_miniature",
]


def load_miniature() -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerBase]:
    """The pretrained miniature, in float32 and in evaluation mode, and its tokenizer."""
    model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(CHECKPOINT)
