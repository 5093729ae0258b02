"""PEFT tests written for LoRA alone that say something about any method, replayed with ours.

Much of PEFT's machinery (state dicts, injection, ``low_cpu_mem_usage``, ``all-linear``, name clashes) is tested
with LoRA only, because built-in methods share that machinery. A third-party method has to show that it does.
While such a test runs, ``LoraConfig`` in its module is a class that takes LoRA's arguments and makes our
configuration.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator
from typing import Any

import pytest
from peft.tuners.tuners_utils import BaseTunerLayer

from .rows import MagnitudeDowserConfig

# fnmatch patterns of "file::Class::test". Left out are tests of LoRA itself: its ranks, scalings and parameter
# names, embeddings and convolutions, weighted sums of adapters, trainable tokens.
REPLAYED = (
    "test_auto.py::*",  # the hub keeps our adapters under the ids of LoRA's
    "test_mapping.py::*",
    "test_helpers.py::TestCheckIsPeftModel::*",
    "test_other.py::test_modules_to_save_targets_module_dict_raises",
    "test_other.py::test_load_multiple_adapters_different_modules_to_save",
    "test_other.py::TestModulesToSave*::*",
    "test_other.py::TestTargetingAuxiliaryTrainingWrapper::*modules_to_save*",
    "test_other.py::TestTargetingAuxiliaryTrainingWrapper::test_targeting_module_to_save_raises",
    "test_other.py::TestGetModuleNamesTiedWithEmbedding::*_peft",
    "test_low_level_api.py::TestInjectAdapterFromStateDict::test_inject_from_state_dict_transformers",
    "test_low_level_api.py::TestInjectAdapterFromStateDict::*_irregular_targets",
    "test_low_level_api.py::TestInjectAdapterFromStateDict::*_extra_keys_warning",
    "test_low_level_api.py::TestInjectAdapterFromStateDict::*_compiled_model",
    "test_low_level_api.py::TestPeftStateDict::test_get_*",
    "test_low_level_api.py::TestPeftStateDict::test_set_*",
    "test_low_level_api.py::TestPeftStateDict::test_trained_modules_to_save*",
    "test_low_level_api.py::TestGetBaseModelStateDict::*",
    "test_tuners_utils.py::TestPeftCustomKwargs::test_maybe_include_all_linear_*",
    "test_tuners_utils.py::TestPeftCustomKwargs::test_all_linear_nested_*",
    "test_tuners_utils.py::TestTargetedModuleNames::*targeted_module_*",
    "test_tuners_utils.py::TestTargetedModuleNames::test_layers_to_transform_*",
    "test_tuners_utils.py::TestExcludedModuleNames::*module*",
    "test_tuners_utils.py::TestFindMinimalTargetModules::test_get_peft_mod*",
    "test_tuners_utils.py::TestBaseTunerWarnForTiedEmbeddings::*",
    "test_tuners_utils.py::TestModelAndLayerStatus::*_enabled_small",
    "test_tuners_utils.py::TestModelAndLayerStatus::*_disabled_small",
    "test_tuners_utils.py::TestModelAndLayerStatus::*_adapters_small",
    "test_tuners_utils.py::TestModelAndLayerStatus::*_devices_all_cpu_small",
    "test_tuners_utils.py::TestModelAndLayerStatus::*requires_grad*_small",
    "test_tuners_utils.py::TestModelAndLayerStatus::*quantization_backend_small",
    "test_tuners_utils.py::TestModelAndLayerStatus::*quantization_backend_bnb",
    "test_tuners_utils.py::TestModelAndLayerStatus::*modules_to_save_irregular",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_with_modules_to_save",
    "test_initialization.py::TestNoInfiniteRecursionDeepspeed::*",
    "test_initialization.py::TestLoadAdapterOfflineMode::*",
    "test_initialization.py::TestCustomModelConfigWarning::*",
    "test_initialization.py::TestLowCpuMemUsage::test_from_*",
    "test_initialization.py::TestLowCpuMemUsage::test_load_*",
    "test_initialization.py::TestLowCpuMemUsage::test_inject_*",
    "test_initialization.py::TestLowCpuMemUsage::test_mixed_*",
    "test_initialization.py::TestNamingConflictWarning::*",
    "test_initialization.py::TestLoadPeftKeyMapping::*_lora",
    "test_custom_models.py::TestPeftCustomModel::test_add_adapter_rejects_duplicate_name_without_mutation",
    "test_custom_models.py::TestPeftCustomModel::test_delete_adapter_with_multiple_adapters_works",
    "test_custom_models.py::TestPeftCustomModel::test_delete_adapter_multiple_adapters_with_modules_to_save",
    "test_custom_models.py::TestPeftCustomModel::test_multiple_adapters_automatic_modules_to_save",
    "test_custom_models.py::TestPeftCustomModel::test_multiple_adapters_no_needless_copy_modules_to_save",
    "test_custom_models.py::TestPeftCustomModel::test_weight_bias_attributes",
    "test_custom_models.py::TestPeftCustomModel::*_model_card",
    "test_custom_models.py::TestPeftCustomModel::*_similarly_named_sibling",
    "test_custom_models.py::TestPeftCustomModel::*_with_scalar_modules_to_save",
    "test_mixed.py::*::test_delete_*adapter",
    "test_mixed.py::*::test_delete_merged_adapter_is_atomic",
    "test_mixed.py::*::test_delete_active_adapter_keeps_remaining_adapter_active",
    "test_mixed.py::*::test_delete_*_modules_to_save",
    "test_mixed.py::*::test_modules_to_save",
    "test_mixed.py::*::test_unload_modules_to_save_*",
    "test_mixed.py::*::test_incompatible_config_raises",
)

_RENAMED = {"init_lora_weights": "init_weights"}
_MEANINGLESS = {"r", "lora_alpha", "lora_dropout"}


class DowserForLora(MagnitudeDowserConfig):
    """Our configuration, made from the arguments of a ``LoraConfig``."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs = {_RENAMED.get(key, key): value for key, value in kwargs.items() if key not in _MEANINGLESS}
        if kwargs.get("bias") == "lora_only":
            kwargs["bias"] = "dowser_only"
        super().__init__(**kwargs)


def applies(item: pytest.Item) -> bool:
    """Whether a collected test is one of those replayed."""
    path = "::".join(part.name for part in item.listchain() if isinstance(part, (pytest.Module, pytest.Class)))
    path = f"{path}::{getattr(item, 'originalname', None) or item.name}".rsplit("/", 1)[-1]
    return any(fnmatch.fnmatch(path, pattern) for pattern in REPLAYED)


@contextlib.contextmanager
def in_place_of_lora(item: pytest.Item) -> Iterator[None]:
    """Replace ``LoraConfig`` in the module of a replayed test, and say so if it fails."""
    if not applies(item):
        yield
        return
    item.add_report_section("setup", "replay", "LoraConfig makes a DowserConfig in this test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(item.module, "LoraConfig", DowserForLora, raising=False)
        patch.setattr(item.module, "LoraLayer", BaseTunerLayer, raising=False)
        yield
