"""The model card of a saved adapter: PEFT writes a template, this fills in how to load it and what was trained.

Whoever receives the adapter reads this card and not the README of this package, and without the import below
PEFT knows no such method. The facts stand between two comments, so that saving again replaces them; all other
text of the card is left alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from dowser_peft.storage import write_text

_GET_STARTED = """```python
import dowser_peft  # registers the method with PEFT; install dowser-peft from its repository
from peft import PeftModel
{base}
model = PeftModel.from_pretrained(base, "path/or/id/of/this/adapter")
model = model.merge_and_unload()  # from here on a model of plain transformers
```

Without the import, loading fails with `KeyError: 'DOWSER'`.

This adapter trained the fraction rho = {rho:g} of each target layer's {trained}, those of lowest importance to the
base model, and left the others as they were: [Model-Dowser](https://arxiv.org/abs/2602.04509)."""
_TRAINED = {"element": "weights", "column": "input columns"}
_HEADING = "Use the code below to get started with the model.\n\n"  # of huggingface_hub's template
_UNFILLED = "[More Information Needed]"
_BEGIN, _END = "<!-- dowser: written by saving -->", "<!-- end of dowser -->"
_BLOCK = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)


def complete_model_card(folder: Path, config: dict[str, Any], retention: dict[str, Any] | None = None) -> None:
    """Write into the card in ``folder``, if there is one, how to load the adapter and how it was made.

    Args:
        folder: of the saved adapter.
        config: as ``DowserConfig.to_dict`` has it.
        retention: loss and accuracy of base and tuned model, as ``dowser-peft train`` measures them; what an earlier
            card said about it goes, because it was about other values.
    """
    path = folder / "README.md"
    if not path.is_file():
        return
    card = ModelCard.load(path, ignore_metadata_errors=True)
    card.data.tags = sorted({*(card.data.tags or []), "dowser"})
    usage = _GET_STARTED.format(base=_base(folder, config), rho=config["rho"], trained=_TRAINED[config["granularity"]])
    text = str(card).replace(_HEADING + _UNFILLED, _HEADING + usage, 1)
    facts = [_BEGIN, "## The Dowser adapter", ""]
    if _HEADING not in text:  # a card of another template, such as TRL's, which shows how to load a whole model
        facts += [usage, ""]
    facts += ["| | |", "| --- | --- |", *(f"| {name} | {fact} |" for name, fact in _facts(folder, config))]
    if retention is not None:
        facts += ["", *_retention(retention)]
    block = "\n".join([*facts, _END])
    found = _BLOCK.search(text)
    text = text[: found.start()] + block + text[found.end() :] if found else f"{text.rstrip()}\n\n{block}\n"
    write_text(path, text)


def _base(folder: Path, config: dict[str, Any]) -> str:
    """Code that loads the base model, of transformers if its class is known: PEFT writes that into the file alone."""
    mapping: dict[str, Any] = {}
    name, file = config["base_model_name_or_path"], folder / CONFIG_NAME
    if file.is_file():
        mapping = json.loads(file.read_text(encoding="utf-8")).get("auto_mapping") or {}
    kind = None
    if str(mapping.get("parent_library")).startswith("transformers."):
        kind = mapping["base_model_class"]
    elif config.get("task_type") == "CAUSAL_LM":
        kind = "AutoModelForCausalLM"
    if not kind or not name:
        return f"\nbase = ...  # the model that was trained{f', {name}' if name else ''}"
    revision = f", revision={json.dumps(config['revision'])}" if config["revision"] else ""
    return f"from transformers import {kind}\n\nbase = {kind}.from_pretrained({json.dumps(str(name))}{revision})"


def complete_trl_card(folder: Path, base: str | None) -> None:
    """In TRL's card, name the base model where it names None, of a local one, and import what its example needs.

    Args:
        folder: with the card.
        base: path or name of the base model.
    """
    path = folder / "README.md"
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    text = text.replace("[None](https://huggingface.co/None)", f"`{base}`" if base else "a local model")
    text = text.replace('model="None"', 'model="path/or/id/of/this/adapter"')
    if "import dowser_peft\nfrom transformers import pipeline" not in text:
        text = text.replace(
            "from transformers import pipeline", "import dowser_peft\nfrom transformers import pipeline"
        )
    write_text(path, text)


def _facts(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    revision = f", revision `{config['revision']}`" if config["revision"] else ""
    yield "base model", f"`{config['base_model_name_or_path']}`{revision}"
    yield "fingerprint of its adapted weights", f"`{config['base_fingerprint']}`"
    what = _TRAINED[config["granularity"]]
    yield "rho", f"{config['rho']:g} of each target layer's {what} (granularity `{config['granularity']}`)"
    for pattern, rho in config["rho_pattern"].items():
        yield f"rho of `{pattern}`".replace("|", r"\|"), f"{rho:g}"
    if (trained := _num_trained(folder / SAFETENSORS_WEIGHTS_NAME)) is not None:
        yield "trained weights", f"{trained:,}"
    importance = config["importance"]
    yield "importance", f"`{importance}`"
    if importance == "dowser":
        behind = ", each behind an image of noise" if config["probe_images"] else ""
        yield "prompts", f"N = {config['num_prompts']} of {config['prompt_length']} tokens{behind}"
        yield "probes", f"R = {config['num_probes']} per prompt, estimator `{config['estimator']}`"
    if importance != "magnitude":
        yield "seed", str(config["seed"])


def _num_trained(weights: Path) -> int | None:
    """How many values the adapter file has; only its header is read."""
    if not weights.is_file():
        return None
    with safe_open(weights, framework="pt") as file:
        names = [name for name in file.keys() if name.endswith(".dowser_values")]  # noqa: SIM118  no mapping
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def _retention(found: dict[str, Any]) -> Iterator[str]:
    split = f", split `{found['split']}`" if found["split"] else ""
    yield f"Retention on `{found['dataset']}`{split}: {found['examples']:,} examples, {found['tokens']:,} tokens."
    yield ""
    yield "| | base | tuned | change |"
    yield "| --- | ---: | ---: | ---: |"
    for key, name in (("loss", "loss"), ("accuracy", "next-token accuracy")):
        base, tuned = found["base"][key], found["tuned"][key]
        yield f"| {name} | {base:.4f} | {tuned:.4f} | {tuned - base:+.4f} |"
