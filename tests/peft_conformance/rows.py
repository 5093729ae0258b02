"""Our rows for the tables of PEFT's test-suite, and the rule that says where they belong.

PEFT parametrizes one shared suite over tables of methods. A table is recognised as one of those when it lists a
*peer*: a built-in method that, like ours, adapts linear layers one by one. Our rows are then written in that
table's own shape, which its argument names tell. A table with a peer and an unknown shape is an error: a new
PEFT release has grown a test that somebody has to look at.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import peft

from dowser_peft import DowserConfig

PEERS = (
    peft.SupertuningConfig,
    peft.ShiraConfig,
    peft.MissConfig,
    peft.HRAConfig,
    peft.RandLoraConfig,
    peft.VeraConfig,
)

# Tables that list a peer for a property that is not ours.
NOT_OURS = {
    "test_inject_adapter_in_model_rejects_shared_state_tuners": "only for methods that share weights among layers",
    "test_add_weighted_adapter_cat_with_rank_pattern": "tests LoRA whatever the row says",
}


@dataclass
class MagnitudeDowserConfig(DowserConfig):
    """Defaults for modules that are not language models: PEFT's rows often give nothing but target_modules."""

    rho: float = 0.5
    importance: str = "magnitude"


_CUSTOM = {"rho": 0.5, "importance": "magnitude"}
_COLUMNS = {**_CUSTOM, "granularity": "column"}
CUSTOM_MODEL_ROWS: list[tuple[str, str, type, dict[str, Any]]] = [
    ("Vanilla MLP 1 Dowser", "MLP", DowserConfig, {**_CUSTOM, "target_modules": "lin0"}),
    ("Vanilla MLP 2 Dowser", "MLP", DowserConfig, {**_CUSTOM, "target_modules": ["lin0"]}),
    ("Vanilla MLP 3 Dowser", "MLP", DowserConfig, {**_CUSTOM, "target_modules": ["lin1"]}),
    ("Vanilla MLP 4 Dowser", "MLP", DowserConfig, {**_CUSTOM, "target_modules": ["lin0", "lin1"]}),
    (
        "Vanilla MLP 5 Dowser modules_to_save",
        "MLP",
        DowserConfig,
        {**_CUSTOM, "target_modules": ["lin0"], "modules_to_save": ["lin1"]},
    ),
    ("Vanilla MLP 6 Dowser random", "MLP", DowserConfig, {"importance": "random", "target_modules": ["lin0", "lin1"]}),
    ("Vanilla MLP 7 Dowser dense", "MLP", DowserConfig, {**_CUSTOM, "target_modules": ["lin0"], "rho": 1.0}),
    ("Embedding + transformers Conv1D Dowser", "EmbConv1D", DowserConfig, {**_CUSTOM, "target_modules": ["conv1d"]}),
    ("Vanilla MLP 8 Dowser columns", "MLP", DowserConfig, {**_COLUMNS, "target_modules": ["lin0", "lin1"]}),
    (
        "Vanilla MLP 9 Dowser columns modules_to_save",
        "MLP",
        DowserConfig,
        {**_COLUMNS, "target_modules": ["lin0"], "modules_to_save": ["lin1"]},
    ),
    ("Conv1D Dowser columns", "EmbConv1D", DowserConfig, {**_COLUMNS, "target_modules": ["conv1d"]}),
]

_NOISY = {"rho": 0.5, "importance": "random", "init_weights": False}
_NOISY_COLUMNS = {**_NOISY, "granularity": "column"}
ADAPTER_PAIR_ROWS: list[tuple[str, str, type, dict[str, Any], dict[str, Any]]] = [
    (
        "Dowser Same",
        "dowser",
        DowserConfig,
        {**_NOISY, "target_modules": ["lin0"]},
        {**_NOISY, "target_modules": ["lin0"], "seed": 1},
    ),
    (
        "Dowser Different",
        "dowser",
        DowserConfig,
        {**_NOISY, "target_modules": ["lin0"]},
        {**_NOISY, "target_modules": ["lin1"]},
    ),
    (
        "Dowser Columns Same",
        "dowser",
        DowserConfig,
        {**_NOISY_COLUMNS, "target_modules": ["lin0"]},
        {**_NOISY_COLUMNS, "target_modules": ["lin0"], "seed": 1},
    ),
    (
        "Dowser Elements and Columns",
        "dowser",
        DowserConfig,
        {**_NOISY, "target_modules": ["lin0"]},
        {**_NOISY_COLUMNS, "target_modules": ["lin1"]},
    ),
]

# For language models: the method itself, with a probe as small as it gets, and the random control, of columns.
PROBED: dict[str, Any] = {"rho": 0.5, "num_prompts": 2, "num_probes": 1, "prompt_length": 8}
RANDOM: dict[str, Any] = {"rho": 0.2, "importance": "random", "granularity": "column"}


def rows_beside(test_name: str, argnames: str | Sequence[str], argvalues: Sequence[Any]) -> list[Any]:
    """Our rows for one parametrized table, in its shape; none if the table is not about methods like ours.

    Args:
        test_name: name of the test function.
        argnames, argvalues: first two arguments of ``pytest.mark.parametrize``.

    Raises:
        LookupError: if the table lists a peer but has a shape that is not known here.
    """
    peer = next((row for row in argvalues if _peers(row)), None)
    if peer is None or test_name in NOT_OURS:
        return []
    if isinstance(argnames, str):
        argnames = [name.strip() for name in argnames.split(",")]
    match list(argnames):
        case ["test_name", "model_id", "config_cls", "config_kwargs"]:
            return list(CUSTOM_MODEL_ROWS)
        case ["test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"]:
            return list(ADAPTER_PAIR_ROWS)
        case ["config_cls", "config_kwargs"]:
            return _beside_kwargs(next(value for value in _values(peer) if isinstance(value, dict)))
        case ["config_class", "mandatory_kwargs"]:
            return [(DowserConfig, {})]
        case ["config_cls"] | ["config_class"]:
            return [MagnitudeDowserConfig]
        case ["config0"]:
            return [MagnitudeDowserConfig(target_modules=["lin0"], init_weights=False)]
        case ["config"]:
            return [MagnitudeDowserConfig()]
    raise LookupError(f"{test_name} lists a method like ours in a table of unknown shape {list(argnames)}")


def _beside_kwargs(peer_kwargs: dict[str, Any]) -> list[tuple[type, dict[str, Any]]]:
    if "task_type" not in peer_kwargs:  # a toy module, not a language model
        return [(DowserConfig, {**_CUSTOM, "target_modules": peer_kwargs["target_modules"]})]
    task = {"task_type": peer_kwargs["task_type"], "target_modules": None}
    return [(DowserConfig, {**task, **PROBED}), (DowserConfig, {**task, **RANDOM})]


def pairs_beside(table: Sequence[Any]) -> list[tuple[Any, ...]]:
    """For a table of two adapters in one mixed model: its rows with LoRA, with our method in LoRA's place."""
    pairs = [row for row in table if isinstance(row, tuple) and all(isinstance(c, peft.PeftConfig) for c in row)]
    return [tuple(map(_instead_of_lora, pair)) for pair in pairs if any(type(c) is peft.LoraConfig for c in pair)]


def _instead_of_lora(config: peft.PeftConfig) -> peft.PeftConfig:
    if type(config) is not peft.LoraConfig:
        return copy.deepcopy(config)
    targets = config.target_modules and list(config.target_modules)
    return MagnitudeDowserConfig(target_modules=targets, init_weights=False)


def _values(row: Any) -> Iterator[Any]:
    if type(row).__name__ == "ParameterSet":  # pytest.param(...)
        row = row.values
    yield from row if isinstance(row, (tuple, list)) else (row,)


def _peers(row: Any) -> bool:
    return any(value in PEERS if isinstance(value, type) else isinstance(value, PEERS) for value in _values(row))


def mentions(row: Sequence[Any], *class_prefixes: str) -> bool:
    """Whether a row of arguments holds a configuration (class or instance) whose class name starts like this."""
    classes = (value if isinstance(value, type) else type(value) for value in row)
    return any(cls.__name__.removeprefix("Magnitude").startswith(class_prefixes) for cls in classes)
