"""The memory of fused experts: what the benchmark counts, against the sizes of the weights and of a real probe."""

from __future__ import annotations

from benchmarks.speed import experts
from dowser_peft import probe
from dowser_peft.targets import default_targets
from tests import models


def test_dowser_keeps_no_effective_weights() -> None:
    kept = {}
    for method in ("Dowser", experts.KEEPING):
        model, forward = experts.training_pass(method, experts.SMALL, 16, checkpointing=False)
        kept[method] = experts.kept_bytes(forward)
    assert kept[experts.KEEPING] - kept["Dowser"] == experts.expert_bytes(model)


def test_statistics_have_the_counted_size() -> None:
    model = models.tiny_qwen3_moe()
    statistics = probe(model, num_prompts=4, num_probes=1, prompt_length=4, progress=False)
    names = set(statistics.module_names) - set(default_targets(model))
    stored = sum(statistics.activation(name).nbytes + statistics.sensitivity(name).nbytes for name in names)
    counted = experts.statistics_bytes(model.config)
    assert counted["experts"] == stored * experts.NUM_PROMPTS // 4
    assert counted["model"] == sum(parameter.numel() for parameter in model.parameters()) * 2
