"""Finding and loading models and adapters: local folders or hub ids, never code without permission."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dowser_peft.cli.common import shows_progress

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Args:
        name: local folder or hub id.
        revision: branch, tag or commit on the hub.
        trust_remote_code: whether the user allowed Python code from the folder to run.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def is_local(self) -> bool:
        """Whether it is a folder on this machine, rather than on the hub."""
        return _is_local(self.name)

    @property
    def path(self) -> str:
        """What ``from_pretrained`` takes: the folder, or the hub id."""
        return os.path.expanduser(self.name) if self.is_local else self.name  # noqa: PTH111  a hub id is no Path

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of every ``from_pretrained``."""
        return {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}


def load_config(source: Source) -> PreTrainedConfig:
    """The configuration of a model.

    Raises:
        OSError: if there is no such model.
        ValueError: if the folder holds something else, or needs code that the user did not allow.
    """
    from transformers import AutoConfig

    if source.is_local:
        folder = Path(source.path)
        if not folder.is_dir():
            raise FileNotFoundError(f"no model folder at {source.name!r}: check the path")
        if not (folder / "config.json").is_file():
            if (folder / ADAPTER_CONFIG).is_file():
                raise ValueError(f"{source.name!r} is an adapter, not a model: pass the model that it was trained on")
            raise ValueError(f"{source.name!r} holds no model: it has no config.json")
    try:
        return AutoConfig.from_pretrained(source.path, **source.options)
    except OSError as error:
        raise OSError(f"cannot read the configuration of the model {source.name!r}: {error}") from error


def model_class(config: PreTrainedConfig, trust_remote_code: bool = False) -> Any:
    """The class to load a model with: the one its configuration names, else the first Auto class that knows it.

    Raises:
        ValueError: if no class fits.
    """
    import transformers

    autos = [
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModel,
    ]
    if trust_remote_code:
        remote = getattr(config, "auto_map", None) or {}
        for auto in autos:
            if auto.__name__ in remote:
                return auto
    for name in (config.architectures or [])[:1]:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    for auto in autos:
        if type(config) in auto._model_mapping:  # type: ignore[operator]
            return auto
    raise ValueError(
        f"transformers has no model class for {config.architectures or config.model_type!r}; if the model comes "
        "with its own code, and you trust it, pass --trust-remote-code"
    )


def load_model(
    source: Source, dtype: str = "auto", device_map: Any = None, load_in_4bit: bool = False, **further: Any
) -> PreTrainedModel:
    """Load a model in evaluation mode, with the class its configuration names.

    Args:
        source: where it comes from.
        dtype: of the weights, one of ``DTYPES``.
        device_map: where the model goes, as of ``from_pretrained``.
        load_in_4bit: quantise to NF4, computing in ``dtype``.
        further: arguments of ``from_pretrained``.

    Raises:
        OSError: if there is no such model.
        ValueError: if it cannot be loaded, or its file lacks weights.
        ImportError: if a package is missing.
    """
    import torch
    import transformers

    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if not shows_progress():
        transformers.utils.logging.disable_progress_bar()
    config = load_config(source)
    options: dict[str, Any] = {"dtype": dtype, **source.options, **further}
    if device_map is not None:
        options["device_map"] = device_map
    if load_in_4bit:
        if find_spec("bitsandbytes") is None:
            raise ImportError('--load-in-4bit needs bitsandbytes: pip install "dowser-peft[quant]"')
        compute_dtype = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype
        )
    model, report = model_class(config, source.trust_remote_code).from_pretrained(
        source.path,
        config=config,
        output_loading_info=True,
        **options,
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"the files of {source.name!r} lack {len(missing)} weights of a {type(model).__name__}, first "
            f"{missing[0]!r}; they would be random numbers. Save or download the model again"
        )
    return model.eval()


def meta_model(source: Source) -> PreTrainedModel:
    """A model without weights: only its configuration is read. Tells names and shapes."""
    import torch
    from transformers import PreTrainedModel

    config = load_config(source)
    found = model_class(config, source.trust_remote_code)
    with torch.device("meta"):
        if issubclass(found, PreTrainedModel):
            return found(config)
        return found.from_config(config, trust_remote_code=source.trust_remote_code)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model, or None if it has none that can be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.path, **source.options)
    except (OSError, ValueError, KeyError, ImportError):
        return None


def model_files(source: Source, patterns: list[str]) -> Path:
    """The local folder with those files of a model that match ``patterns``; downloads them from the hub."""
    if source.is_local:
        return Path(source.path)
    return _download(source.name, revision=source.revision, allow_patterns=patterns)


def adapter_folder(name: str) -> Path:
    """The local folder of an adapter; downloads it if ``name`` is a hub id.

    Raises:
        OSError: if there is no such adapter.
        ValueError: if the folder holds something else.
    """
    folder = Path(name).expanduser()
    if not folder.exists() and not _is_local(name):
        folder = _download(name, ignore_patterns=["checkpoint-*", "*.bin", "*.pt", "*.pth", "*.py"])
    if folder.is_file() and folder.name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        folder = folder.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"no adapter folder at {name!r}: check the path")
    if not (folder / ADAPTER_CONFIG).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
        hint = f"; did you mean one of its subfolders {inside}?" if inside else ""
        raise ValueError(f"{name!r} holds no adapter: it has no {ADAPTER_CONFIG}{hint}")
    return folder


def adapter_config(folder: Path, wanted: str = "DOWSER") -> Any:
    """The configuration of an adapter, by default of a Dowser adapter.

    Raises:
        ValueError: if it is damaged, of another PEFT method, or the weights beside it are missing or damaged.
    """
    from peft import PeftConfig

    import dowser_peft  # noqa: F401  registers the method
    from dowser_peft.storage import check_safetensors

    try:
        method = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{str(folder / ADAPTER_CONFIG)!r} is damaged ({error}); copy or save it again") from error
    if method != wanted:
        raise ValueError(
            f"{str(folder)!r} is an adapter of the method {method}; this command is for {wanted} adapters"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"{str(folder)!r} has no {ADAPTER_WEIGHTS}: save the adapter again, or copy all of it")
    check_safetensors(folder / ADAPTER_WEIGHTS, "adapter")
    return PeftConfig.from_pretrained(str(folder))


def base_source(config: PeftConfig, base: str | None, trust_remote_code: bool, option: str) -> Source:
    """Where the base model of an adapter comes from; ``base``, given with ``option``, goes before the adapter's.

    Raises:
        ValueError: if neither says.
    """
    if base is not None:
        return Source(base, None, trust_remote_code)
    if not config.base_model_name_or_path:
        raise ValueError(f"the adapter does not say which model it was trained on: pass {option} MODEL")
    return Source(config.base_model_name_or_path, config.revision, trust_remote_code)


def _download(name: str, **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, **options))
    except OSError as error:
        raise OSError(f"cannot read {name!r}, which is no folder here, from the hub: {error}") from error


def _is_local(name: str) -> bool:
    """Whether ``name`` is a path rather than a hub id, whether or not it exists."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).expanduser().exists()
