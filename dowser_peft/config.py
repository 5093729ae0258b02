"""DowserConfig: what a user can choose. Every field is documented once, in its ``help``."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, PeftType
from peft.utils.other import get_pattern_key

from dowser_peft.model_card import complete_model_card
from dowser_peft.probing.statistics import ProbeStatistics
from dowser_peft.storage import check_safetensors

Bias = Literal["none", "all", "dowser_only"]
Estimator = Literal["rms", "mean_abs"]
Granularity = Literal["element", "column"]
SaveDtype = Literal["float32", "bfloat16"]
IMPORTANCE_NAMES = ("dowser", "magnitude", "wanda", "random")


def _field(default: Any, help: str) -> Any:
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class DowserConfig(PeftConfig):
    """Configuration of a Model-Dowser adapter (arXiv 2602.04509).

    Every weight of the target layers is scored by how far the model's output moves when it is perturbed,
    without any data; the fraction ``rho`` of each layer with the lowest scores trains, the rest is frozen.

        model = get_peft_model(model, DowserConfig(rho=0.1))
    """

    rho: float = _field(0.1, "Fraction of each target layer's weights that train, in (0, 1].")
    granularity: Granularity = _field(
        "element",
        "What is chosen: 'element', single weights, or 'column', whole input columns of lowest summed importance: "
        "y = base(x) + x[..., c] V^T, which calls the base layer as it is and needs neither an effective weight nor "
        "a dense gradient.",
    )
    rho_pattern: dict[str, float] = _field(
        {},
        "Other values of rho for some modules or parameters: name or regex -> rho, matched like LoRA's rank_pattern; "
        "a full name goes before any regex.",
    )
    target_modules: list[str] | str | None = _field(
        None,
        "Modules to adapt: a list of name endings, a regex, or 'all-linear'. Default: the attention and MLP "
        "projections of the language decoder (of every layer of an encoder); vision tower, projector, "
        "embeddings and output head stay frozen.",
    )
    target_parameters: list[str] | None = _field(
        None,
        "Experts to adapt that are fused into one parameter [experts, out, in]: a list of name endings, such as "
        "'experts.down_proj'. Default, where target_modules is left to its default: all of the language decoder; "
        "else none. Each expert has scores and a mask of its own.",
    )
    exclude_modules: list[str] | str | None = _field(
        None,
        "Modules and parameters not to adapt although they are targets: a list of name endings or a regex; 'experts' "
        "means all parameters of the module.",
    )
    num_last_layers: int | None = _field(
        None, "Fine-tuning depth of the paper: adapt only the last n decoder layers, counted from the output."
    )
    layers_to_transform: list[int] | int | None = _field(
        None, "Indices of the layers to adapt; target_modules may then be a list of names or None, but no regex."
    )
    layers_pattern: list[str] | str | None = _field(
        None, "Name of the module list that layers_to_transform counts in, if it is not found by itself."
    )
    modules_to_save: list[str] | None = _field(
        None, "Further modules that train in full and are saved with the adapter, e.g. a new classifier head."
    )
    bias: Bias = _field(
        "none", "Which biases train: 'none', 'all' of the model, or 'dowser_only', those of the target layers."
    )
    fan_in_fan_out: bool = _field(
        False, "The target layers store [in, out] weights (transformers' Conv1D, as in GPT-2)."
    )
    init_weights: bool = _field(
        True, "Start from a zero delta. False draws random values: for tests, never for training."
    )
    importance: str | os.PathLike[str] | ProbeStatistics = _field(
        "dowser",
        "How weights are scored: 'dowser' (the paper), 'magnitude' (|W|), 'wanda' (|W| |h|), 'random', or "
        "the statistics of an earlier probe (a ProbeStatistics, or the path of its file) for the paper's score.",
    )
    num_prompts: int = _field(64, "N: how many prompts the model writes for itself.")
    num_probes: int = _field(8, "R: Rademacher vectors per prompt of the Hutchinson estimate.")
    prompt_length: int = _field(64, "Tokens of each prompt.")
    temperature: float = _field(0.9, "Sampling temperature of the prompts.")
    top_p: float = _field(0.9, "Nucleus sampling threshold of the prompts.")
    repetition_penalty: float = _field(1.05, "Repetition penalty of the prompts.")
    probe_images: bool = _field(
        False,
        "Put an image of noise before each prompt that a multimodal model writes, so that the masks heed what its "
        "decoder does with images; the paper's prompts are text alone.",
    )
    probe_tolerance: float | None = _field(
        None,
        "End the probe as soon as the expected share of trained weights that unlimited probing would not train is at "
        "most this, in (0, 1); 0.05 is about what the paper's N and R reach. Each prompt then gets one vector, and "
        "num_prompts * num_probes prompts are the limit. Default: the paper's fixed N and R.",
    )
    probe_batch_size: int | None = _field(
        None, "Prompts per forward pass of the probe; chosen from free memory by default. The masks are the same."
    )
    estimator: Estimator = _field(
        "rms",
        "Sensitivity estimate: 'rms' (root mean square of the gradients, the paper) or 'mean_abs' (mean "
        "absolute gradient over batches of four prompts, the authors' published code).",
    )
    seed: int = _field(0, "Seed of the prompts, their images, the Rademacher vectors and importance='random'.")
    save_dtype: SaveDtype = _field(
        "float32", "Precision of the trained values in a saved adapter: 'float32' or 'bfloat16'."
    )
    base_fingerprint: str | None = _field(
        None,
        "Written by saving, never set by hand: fingerprint of the base weights that the masks were chosen "
        "for. Its presence marks a saved adapter, which is loaded without probing.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.DOWSER  # type: ignore[attr-defined]
        # Filled while one model is adapted; never saved.
        self._masks: dict[str, torch.Tensor] = {}  # module -> mask, or column ids, of the adapter being injected
        self._parameters: list[str] = []  # fused parameters of the adapter being injected
        self._default_targets: Any = None  # what ``target_modules=None`` was resolved to
        self._default_parameters: Any = None  # what ``target_parameters=None`` was resolved to
        self._trainable_before: set[str] = set()  # parameters to unfreeze if loading has to be undone
        self._recorded_probe: dict[str, Any] = {}  # of statistics that were passed in: how they were made
        self._recorded_base: str | None = None  # what ``base_fingerprint`` will be in the file
        if isinstance(self.target_modules, list):
            self.set_targets(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        self.rho = _checked_rho("rho", self.rho)
        self.rho_pattern = {
            pattern: _checked_rho(f"rho_pattern[{pattern!r}]", rho) for pattern, rho in self.rho_pattern.items()
        }
        self._check_layers()
        for name in ("num_prompts", "num_probes", "prompt_length"):
            _check_positive_int(name, getattr(self, name))
        for name in ("num_last_layers", "probe_batch_size"):
            if getattr(self, name) is not None:
                _check_positive_int(name, getattr(self, name))
        if not isinstance(self.probe_images, bool):
            raise TypeError(f"probe_images must be True or False, got {self.probe_images!r}")
        if self.probe_tolerance is not None and not 0 < self.probe_tolerance < 1:
            raise ValueError(
                f"probe_tolerance is a share of the trained weights, in (0, 1), or None; got {self.probe_tolerance}"
            )
        if self.probe_tolerance is not None and self.estimator != "rms":
            raise ValueError("probe_tolerance needs estimator='rms': the authors' code has fixed N and R")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be positive, got {self.repetition_penalty}")
        choices_of = {"bias": Bias, "estimator": Estimator, "granularity": Granularity, "save_dtype": SaveDtype}
        for name, choices in choices_of.items():
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {get_args(choices)}, got {getattr(self, name)!r}")
        self._check_importance()

    def _check_importance(self) -> None:
        if isinstance(self.importance, ProbeStatistics) or self.importance in IMPORTANCE_NAMES:
            return
        if not isinstance(self.importance, str | os.PathLike):
            raise TypeError(
                f"importance must be one of {IMPORTANCE_NAMES}, ProbeStatistics or the path of their file, got "
                f"{type(self.importance).__name__}"
            )
        if not Path(self.importance).is_file():
            raise ValueError(
                f"importance={str(self.importance)!r} is neither one of {IMPORTANCE_NAMES} nor a file of probe "
                "statistics (write one with `dowser-peft probe MODEL -o stats.safetensors`)"
            )

    def _check_layers(self) -> None:
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where layers_to_transform counts: set that as well")
        if isinstance(self.target_parameters, str):
            raise TypeError(
                f"target_parameters must be a list of name endings, such as [{self.target_parameters!r}], got a string"
            )
        if self.target_parameters and self.granularity == "column":
            raise ValueError(
                "granularity='column' does not support target_parameters (fused experts): use granularity='element', "
                "or leave target_parameters out"
            )
        if self.layers_to_transform is not None:
            if self.num_last_layers is not None:
                raise ValueError("set either num_last_layers or layers_to_transform, not both")
            if isinstance(self.target_modules, str):
                raise ValueError(
                    "layers_to_transform cannot be used with target_modules as a string: put the layers into the regex"
                )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it is written to ``adapter_config.json``.

        What matters only while an adapter is created (statistics at hand, a path on this machine, a batch
        size) is left out, so that loading never depends on it.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["rho_pattern"] = dict(self.rho_pattern)
        if self.importance not in IMPORTANCE_NAMES:
            values["importance"] = "dowser"
        values["probe_batch_size"] = None
        values |= self._recorded_probe
        values["base_fingerprint"] = self.base_fingerprint or self._recorded_base
        return values

    def rho_of(self, module_name: str) -> float:
        """rho of one module: that of its name in ``rho_pattern``, else of the first match there, else ``rho``."""
        return self.rho_pattern.get(self.rho_key_of(module_name), self.rho)

    def rho_key_of(self, module_name: str) -> str:
        """The key of ``rho_pattern`` that holds for a module; the name of the module if none does."""
        if module_name in self.rho_pattern:
            return module_name
        return get_pattern_key(list(self.rho_pattern), module_name)

    def set_targets(self, names: Iterable[str]) -> None:
        """Target exactly these modules; a set, as everywhere in PEFT."""
        self.target_modules = set(names)  # type: ignore[assignment]

    def record_base(self, fingerprint: str | None) -> None:
        """Remember the base weights for saving; only ``to_dict`` shows it, so that a reused config probes afresh."""
        self._recorded_base = fingerprint

    def probe_settings(self) -> dict[str, Any]:
        """The keyword arguments of :func:`dowser_peft.probe` that this configuration asks for."""
        same = ("num_prompts", "num_probes", "prompt_length", "estimator", "temperature", "top_p", "seed", "rho")
        settings = {name: getattr(self, name) for name in (*same, "repetition_penalty")}
        renamed = {"images": "probe_images", "tolerance": "probe_tolerance", "batch_size": "probe_batch_size"}
        return settings | {name: getattr(self, field) for name, field in renamed.items()}

    def record_probe(self, statistics: ProbeStatistics) -> None:
        """Let the saved configuration tell how the statistics in use were made."""
        self._recorded_probe = {"num_probes": statistics.num_probes, "seed": statistics.seed}
        self._recorded_probe |= {"estimator": statistics.estimator, "probe_images": statistics.images}
        if statistics.estimator == "rms":  # one row a prompt
            self._recorded_probe["num_prompts"] = statistics.num_prompts
        if statistics.prompt_length:
            self._recorded_probe["prompt_length"] = statistics.prompt_length

    @property
    def is_saved_adapter(self) -> bool:
        """Whether this configuration was read back from a saved adapter, whose file holds the masks."""
        return self.base_fingerprint is not None

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` beside the old one and rename: a full disk leaves the old file intact."""
        if Path(save_directory).is_file():
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save_directory, prefix=".saving-") as scratch:
            super().save_pretrained(scratch, **kwargs)
            for written in Path(scratch).iterdir():
                written.replace(Path(save_directory) / written.name)
        if self.is_saved_adapter or self._recorded_base:
            complete_model_card(Path(save_directory), self.to_dict())

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> DowserConfig:
        """Read ``adapter_config.json``, after a look at the weights file beside it.

        PEFT wraps the model before it opens the weights. A truncated or corrupted file is therefore refused
        here, while the model is still as it was.

        Raises:
            ValueError: if the weights file beside the configuration is unreadable.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        weights = folder / SAFETENSORS_WEIGHTS_NAME
        if weights.is_file():
            check_safetensors(weights, "adapter")
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)


def _checked_rho(name: str, rho: Any) -> float:
    if isinstance(rho, bool) or not isinstance(rho, numbers.Real):
        raise TypeError(f"{name} must be a number in (0, 1], got {rho!r}")
    rho = float(rho)
    if math.isnan(rho) or not 0.0 < rho <= 1.0:
        hint = f"; rho is a fraction: for {rho:g} % write {rho / 100:g}" if 1.0 < rho <= 100.0 else ""
        raise ValueError(f"{name} must be in (0, 1], got {rho}{hint}")
    return rho


def _check_positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


DowserConfig.__doc__ = (
    (DowserConfig.__doc__ or "")
    + "\n    Args:\n"
    + "\n".join(
        f"        {f.name}: {f.metadata['help']}" for f in dataclasses.fields(DowserConfig) if "help" in f.metadata
    )
)
