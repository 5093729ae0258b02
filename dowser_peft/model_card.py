"""The model card of a saved adapter: PEFT writes a template, this fills in how to load it.

Whoever receives the adapter reads this card and not the README of this package, and without the import below
PEFT knows no such method.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import ModelCard

_GET_STARTED = """```python
import dowser_peft  # pip install dowser-peft; registers the method with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/or/id/of/this/adapter")
model = model.merge_and_unload()  # from here on a model of plain transformers
```

Without the import, loading fails with `KeyError: 'DOWSER'`.

This adapter trained the fraction rho = {rho:g} of each target layer's {trained}, those of lowest importance to the
base model, and left the others as they were: [Model-Dowser](https://arxiv.org/abs/2602.04509)."""
_TRAINED = {"element": "weights", "column": "input columns"}
_HEADING = "Use the code below to get started with the model.\n\n"  # of huggingface_hub's template
_UNFILLED = "[More Information Needed]"


def complete_model_card(folder: Path, rho: float, granularity: str) -> None:
    """Fill "How to Get Started" and the tags of the card in ``folder``, if PEFT's template is there unfilled."""
    path = folder / "README.md"
    if not path.is_file():
        return
    card = ModelCard.load(path, ignore_metadata_errors=True)
    card.data.tags = sorted({*(card.data.tags or []), "dowser"})
    text = str(card).replace(
        _HEADING + _UNFILLED, _HEADING + _GET_STARTED.format(rho=rho, trained=_TRAINED[granularity]), 1
    )
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        written = Path(scratch, "README.md")
        written.write_text(text, encoding="utf-8")
        written.replace(path)
