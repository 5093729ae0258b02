"""Model-Dowser for PEFT: fine-tune large models without forgetting.

    from peft import get_peft_model
    from dowser_peft import DowserConfig

    model = get_peft_model(model, DowserConfig(rho=0.1))   # probes, scores, freezes

Importing this package registers the method with PEFT, which also makes saved adapters loadable.
"""

from dowser_peft.registration import register

register()

from dowser_peft.config import DowserConfig  # noqa: E402  as all below: the enum member has to exist first
from dowser_peft.model import DowserModel  # noqa: E402
from dowser_peft.model_probe import probe  # noqa: E402
from dowser_peft.probing import ProbeStatistics  # noqa: E402
from dowser_peft.ranks import this_rank_only  # noqa: E402
from dowser_peft.scoring import bottom_rho_mask  # noqa: E402

__all__ = ["DowserConfig", "DowserModel", "ProbeStatistics", "bottom_rho_mask", "probe", "this_rank_only"]
