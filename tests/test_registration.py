"""Registration with PEFT: a real enum member, entered once."""

from __future__ import annotations

import copy
import pickle

from peft import PeftConfig, PeftType, get_peft_config
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from dowser_peft import DowserConfig, DowserModel
from dowser_peft.registration import add_enum_member, register


def test_the_enum_member_is_like_any_other() -> None:
    member = PeftType.DOWSER
    assert isinstance(member, PeftType) and isinstance(member, str)
    assert member == "DOWSER" and member.value == "DOWSER" and member.name == "DOWSER"
    assert PeftType("DOWSER") is member and PeftType["DOWSER"] is member
    assert member in list(PeftType) and "DOWSER" in PeftType.__members__
    assert copy.deepcopy(member) is member and pickle.loads(pickle.dumps(member)) is member
    assert hash(member) == hash("DOWSER") and repr(member) == "<PeftType.DOWSER: 'DOWSER'>"


def test_tables() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.DOWSER] is DowserConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["DOWSER"] is DowserModel
    assert PEFT_TYPE_TO_MIXED_MODEL_MAPPING[PeftType.DOWSER] is DowserModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.DOWSER] == "dowser_"
    assert isinstance(get_peft_config({"peft_type": "DOWSER", "rho": 0.2}), DowserConfig)
    assert PeftConfig.from_peft_type(peft_type="DOWSER", rho=0.2).rho == 0.2


def test_registering_again_changes_nothing() -> None:
    members, tables = list(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING)
    register()
    add_enum_member("DOWSER")
    assert list(PeftType) == members and dict(PEFT_TYPE_TO_TUNER_MAPPING) == tables
