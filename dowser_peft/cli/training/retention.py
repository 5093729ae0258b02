"""What the tuned model kept: loss and next-token accuracy on held-out data, before and after.

The base is the tuned model with its adapter disabled, so there is never a second model in memory. Over all
tokens t of all examples that count (labels other than -100, and not the places of pictures):

    loss       mean of -log p(token_t | before t)
    accuracy   share of tokens that the model itself would have chosen
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, IterableDataset
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from dowser_peft.cli.common import out
from dowser_peft.cli.training.trainer import DowserTrainer

_SEED = 0  # of the choice of examples: the same for every run on the same data


@dataclass(frozen=True)
class Retention:
    """How one model does on the retention data."""

    loss: float
    accuracy: float
    tokens: int
    examples: int


def held_out(dataset: Dataset | IterableDataset, limit: int) -> Dataset:
    """At most ``limit`` examples: a fixed random choice, or the first of a stream."""
    if isinstance(dataset, IterableDataset):
        return Dataset.from_list(list(dataset.take(limit)), features=dataset.features)
    if len(dataset) <= limit:
        return dataset
    return dataset.shuffle(seed=_SEED).select(range(limit))


def token_scores(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sums over the tokens of each sequence that count.

    Args:
        logits: ``[batch, tokens, vocabulary]``.
        labels: ``[batch, tokens]``, -100 where a token does not count.

    Returns:
        ``[batch, 3]``, float64: negative log-likelihood, tokens that the model would have chosen, tokens.
    """
    sums = []
    for row, wanted in zip(logits[:, :-1], labels[:, 1:], strict=True):  # a row at a time: softmax of all is large
        kept = wanted != -100
        scores, wanted = row[kept].float(), wanted[kept]
        loss = F.cross_entropy(scores, wanted, reduction="sum").double()
        sums.append(torch.stack([loss, (scores.argmax(-1) == wanted).sum().double(), kept.sum().double()]))
    return torch.stack(sums)


def measure(trainer: DowserTrainer, dataset: Dataset, adapted: bool) -> Retention:
    """Loss and accuracy of the model of ``trainer``; trains nothing, and leaves random numbers as they were.

    Args:
        trainer: before or after training.
        dataset: as :meth:`DowserTrainer.prepare_held_out` returns it.
        adapted: of the tuned model, rather than of the base.

    Raises:
        ValueError: if no token of the data counts.
    """
    model: Any = trainer.model_wrapped
    accelerator = trainer.accelerator
    loader = prepare_data_loader(
        DataLoader(
            dataset,
            batch_size=trainer.args.per_device_eval_batch_size,
            collate_fn=trainer.held_out_collator(dataset[0]),
            num_workers=trainer.args.dataloader_num_workers,
        ),
        device=accelerator.device,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        put_on_device=True,
    )
    sums, examples = torch.zeros(3, dtype=torch.float64), 0
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), trainer.adapter(adapted), accelerator.autocast():
            for batch in tqdm(loader, desc="Retention", disable=trainer.args.disable_tqdm, leave=False):
                labels = batch.pop("labels")
                if trainer.image_token_id is not None:
                    labels = labels.masked_fill(labels == trainer.image_token_id, -100)
                scores = accelerator.gather_for_metrics(token_scores(model(**batch).logits, labels))
                sums += scores.sum(0).cpu()
                examples += len(scores)
    finally:
        model.train(was_training)
    loss, correct, tokens = sums.tolist()
    if not tokens:
        raise ValueError("the retention data has no token that counts: is --max_length too short for its answers?")
    return Retention(loss / tokens, correct / tokens, int(tokens), examples)


def report(name: str, split: str | None, base: Retention, tuned: Retention) -> dict[str, Any]:
    """What ``retention.json`` and the model card say."""
    return {
        "dataset": name,
        "split": split,
        "examples": base.examples,
        "tokens": base.tokens,
        "base": {"loss": base.loss, "accuracy": base.accuracy},
        "tuned": {"loss": tuned.loss, "accuracy": tuned.accuracy},
    }


def print_report(found: dict[str, Any]) -> None:
    """The report as a small table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column in ("", "base", "tuned", "change"):
        table.add_column(column, justify="right" if column else "left")
    for name in ("loss", "accuracy"):
        base, tuned = found["base"][name], found["tuned"][name]
        table.add_row(name, f"{base:.4f}", f"{tuned:.4f}", f"{tuned - base:+.4f}")
    out.print()
    out.print(
        Text(
            f"Retention on {found['dataset']}: {found['examples']} examples, {found['tokens']:,} tokens", style="bold"
        ),
        soft_wrap=True,
    )
    out.print(table)
