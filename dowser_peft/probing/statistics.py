"""What a probe keeps: two small factors per layer, from which any score and any mask follow.

For a layer [out, in] and N prompts the full score matrix has out * in entries, but it factors exactly into
A [N, in] (mean |h| per prompt) and Psi [N, out] (sensitivity per prompt). Layers that read the same tensor
(q/k/v, gate/up) share one A. Both are kept in bfloat16: the rounding, 0.4 %, is far below the sampling
error of N = 64 prompts, every value keeps the same relative precision however small it is, and a file of a
7B Llama stays under 300 MB.

Of fused experts each is a module of its own here, called ``...experts.gate_up_proj.3``. It has N rows like any other,
zero for the prompts that did not reach it, so that a mixture of many small experts has large statistics: 1.7 GB for
Mixtral 8x7B, 5.0 GB for Qwen3-30B-A3B (benchmarks/speed/results/experts.jsonl).
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dowser_peft.storage import check_safetensors, write_safetensors

_FORMAT = "dowser-peft probe statistics v1"


@dataclass(frozen=True, eq=False)
class ProbeStatistics:
    """Statistics of one probe of one base model; the same for every rho and every task.

    Args:
        activations: per input group, mean ``|h|`` over the tokens of each prompt, ``[N, in]``, bfloat16.
        sensitivities: per module, ``psi`` of each prompt, ``[N, out]``, bfloat16.
        input_groups: module -> key of ``activations``; modules that share an input share a group.
        num_probes: R of the Hutchinson estimate.
        prompt_length: tokens per prompt (0 if the probe ran on batches of data).
        seed: of the prompts, their images and the Rademacher vectors.
        estimator: 'rms' or 'mean_abs'.
        source: 'synthetic' prompts or 'batches' of data.
        fingerprint: of the base weights that were probed.
        versions: of the packages that took part.
        mask_error: of a probe that ended by itself: the share of trained weights that unlimited probing is expected
            not to train; None of a probe with fixed N and R.
        mask_error_rho: the fraction of trained weights that ``mask_error`` was estimated for.
        images: whether an image of noise preceded each synthetic prompt; its tokens are not in ``prompt_length``.
    """

    activations: dict[str, torch.Tensor] = dataclasses.field(repr=False)
    sensitivities: dict[str, torch.Tensor] = dataclasses.field(repr=False)
    input_groups: dict[str, str] = dataclasses.field(repr=False)
    num_probes: int
    prompt_length: int
    seed: int
    estimator: str
    source: str
    fingerprint: str
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    mask_error: float | None = None
    mask_error_rho: float | None = None
    images: bool = False

    @property
    def module_names(self) -> list[str]:
        return list(self.sensitivities)

    @property
    def num_prompts(self) -> int:
        """N: rows of every statistic (with estimator 'mean_abs', the number of batches of four)."""
        return next(iter(self.sensitivities.values())).shape[0]

    def activation(self, module_name: str) -> torch.Tensor:
        """A of a module, ``[N, in]``."""
        return self.activations[self.input_groups[module_name]]

    def sensitivity(self, module_name: str) -> torch.Tensor:
        """Psi of a module, ``[N, out]``."""
        return self.sensitivities[module_name]

    def shape(self, module_name: str) -> tuple[int, int]:
        """(out, in) of a module."""
        return self.sensitivity(module_name).shape[1], self.activation(module_name).shape[1]

    def check_modules(self, shapes: dict[str, tuple[int, int]]) -> None:
        """Check that these statistics describe the modules ``{name: (out, in)}``.

        Raises:
            ValueError: naming the modules that are missing or have another shape.
        """
        missing = [name for name in shapes if name not in self.sensitivities]
        if missing:
            raise ValueError(
                f"the probe statistics do not cover {len(missing)} of {len(shapes)} target modules, first "
                f"{missing[0]!r}; they cover {len(self.sensitivities)} modules, such as "
                f"{self.module_names[0]!r}. Probe this model, or set target_modules to what was probed"
            )
        wrong = [name for name, shape in shapes.items() if self.shape(name) != tuple(shape)]
        if wrong:
            raise ValueError(
                f"the probe statistics are of another architecture: {wrong[0]!r} is {list(shapes[wrong[0]])} "
                f"[out, in] in the model but {list(self.shape(wrong[0]))} in the statistics ({len(wrong)} of "
                f"{len(shapes)} modules differ). Probe this model"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; an older file at ``path`` stays intact if writing fails."""
        tensors = {f"activation.{name}": value.contiguous() for name, value in self.activations.items()}
        tensors |= {f"sensitivity.{name}": value.contiguous() for name, value in self.sensitivities.items()}
        header = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("activations", "sensitivities")
        }
        write_safetensors(path, tensors, {"format": _FORMAT, "probe": json.dumps(header)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ProbeStatistics:
        """Read a file written by :meth:`save`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is truncated, corrupted, or not a file of probe statistics.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file of probe statistics at {os.fspath(path)!r}")
        check_safetensors(path, "probe statistics")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(
                    f"{os.fspath(path)!r} is not a file of probe statistics: its format is "
                    f"{metadata.get('format')!r}, expected {_FORMAT!r}"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a mapping
        try:
            header: dict[str, Any] = json.loads(metadata["probe"])
            groups = header["input_groups"]  # in the order of the model; the file sorts its tensors
            statistics = cls(
                activations={group: tensors[f"activation.{group}"] for group in dict.fromkeys(groups.values())},
                sensitivities={name: tensors[f"sensitivity.{name}"] for name in groups},
                **header,
            )
            if not groups:
                raise ValueError("there are no modules in it")
            num_prompts = statistics.num_prompts
            for name in statistics.module_names:
                for factor in (statistics.activation(name), statistics.sensitivity(name)):
                    if factor.ndim != 2 or factor.shape[0] != num_prompts or num_prompts == 0:
                        raise ValueError(
                            f"a factor of {name!r} has shape {list(factor.shape)}, not [{num_prompts}, ...]"
                        )
                    if not factor.is_floating_point() or bool((factor < 0).any()):
                        raise ValueError(f"a factor of {name!r} is not of non-negative floats")
            if not isinstance(statistics.fingerprint, str):
                raise ValueError(f"its fingerprint is {statistics.fingerprint!r}")
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"the probe statistics {os.fspath(path)!r} are damaged: {error}") from error
        return statistics

    def __deepcopy__(self, memo: dict[int, Any]) -> ProbeStatistics:
        return self  # immutable, and hundreds of megabytes for a large model
