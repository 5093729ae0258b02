"""The only file that touches PEFT's tables: makes DOWSER a PEFT type. Runs once, on import.

PEFT has no entry points and its type is a closed enum, so a real member is added to it. Its mixed model keeps
hard-coded lists of the types it can combine; Dowser is entered there as well, so that LoRA and Dowser can sit
on different layers of one model.
"""

from __future__ import annotations

from typing import Any

import peft.tuners.mixed.model
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method

NAME = "dowser"


def add_enum_member(name: str) -> None:
    """Add a member to PEFT's ``PeftType``, as the class statement would have; nothing if it exists."""
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member


def register() -> None:
    """Register the method with PEFT; safe to call again."""
    add_enum_member(NAME.upper())
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    from dowser_peft.config import DowserConfig
    from dowser_peft.model import DowserModel

    if PeftType(NAME.upper()) in PEFT_TYPE_TO_TUNER_MAPPING:
        return
    register_peft_method(name=NAME, config_cls=DowserConfig, model_cls=DowserModel, is_mixed_compatible=True)
    _register_mixed()


def _register_mixed() -> None:
    from dowser_peft.config import DowserConfig
    from dowser_peft.experts_layer import Experts
    from dowser_peft.model import DowserModel
    from dowser_peft.tuner_layer import DowserLayer

    mixed: Any = peft.tuners.mixed.model
    mixed.COMPATIBLE_TUNER_TYPES += (PeftType(NAME.upper()),)
    peft.tuners.mixed.COMPATIBLE_TUNER_TYPES = mixed.COMPATIBLE_TUNER_TYPES
    mixed.PREFIXES.append(DowserModel.prefix)
    mixed.Configs = mixed.Configs | DowserConfig
    mixed.Layers += (DowserLayer,)
    create_and_replace = mixed.MixedModel._create_and_replace
    inject_parameters = mixed.MixedModel._inject_parameters
    replace_module = mixed.MixedModel._replace_module

    def _create_and_replace(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(config, DowserConfig):
            DowserModel._create_and_replace(self, config, *args, **kwargs)
        else:
            create_and_replace(self, config, *args, **kwargs)

    def _inject_parameters(self: Any, peft_config: Any, *args: Any, **kwargs: Any) -> list[str]:
        if isinstance(peft_config, DowserConfig):
            return DowserModel._inject_parameters(self, peft_config, *args, **kwargs)
        return inject_parameters(self, peft_config, *args, **kwargs)

    def _replace_module(self: Any, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        if isinstance(child, Experts):
            setattr(parent, child_name, new_module)
        else:
            replace_module(self, parent, child_name, new_module, child)

    def inject_adapter(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        is_dowser = isinstance(self.peft_config[adapter_name], DowserConfig)
        tuner = DowserModel if is_dowser else BaseTuner
        tuner.inject_adapter(self, model, adapter_name, *args, **kwargs)

    mixed.MixedModel._create_and_replace = _create_and_replace
    mixed.MixedModel._inject_parameters = _inject_parameters
    mixed.MixedModel._replace_module = _replace_module
    mixed.MixedModel.inject_adapter = inject_adapter
