"""Probing: what inputs each layer sees, and how far the output moves when the layer's output does.

Data-free: the model writes its own prompts (`prompts`), one forward pass per batch records the inputs, and R
backward passes from random signs on the output give the sensitivities (`hooks`, and `experts` of fused experts).
What remains of a probe is two small factors per layer (`statistics`). A probe may end as soon as the masks have
settled (`stopping`).
"""

from dowser_peft.probing.collect import collect_statistics, per_expert
from dowser_peft.probing.prompts import Sampling
from dowser_peft.probing.statistics import ProbeStatistics
from dowser_peft.probing.stopping import StoppingRule, WeightSample

__all__ = ["ProbeStatistics", "Sampling", "StoppingRule", "WeightSample", "collect_statistics", "per_expert"]
