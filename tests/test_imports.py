"""The direction of imports: each part of the package knows only what stands below it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dowser_peft"

# What each part may import of the package; ``allows_peft``: whether it may know PEFT.
ALLOWED: dict[str, set[str]] = {
    "bitmask": set(),
    "column_ids": set(),
    "storage": set(),
    "model_card": {"storage"},
    "blockwise": set(),
    "fused_experts": set(),
    "partitioned": set(),
    "ranks": {"partitioned"},
    "on_demand": {"partitioned"},
    "base_layer": {"blockwise", "fused_experts", "partitioned"},
    "targets": {"base_layer", "fused_experts"},
    "probing": {"fused_experts", "ranks", "storage"},
    "scoring": {"bitmask"},
    "sparse_delta": {"bitmask"},
    "column_delta": set(),
    "config": {"model_card", "probing", "storage"},
    "factors": {"probing"},
    "fingerprint": {"base_layer", "fused_experts", "ranks"},
    "model_probe": {
        "base_layer",
        "config",
        "fingerprint",
        "fused_experts",
        "on_demand",
        "partitioned",
        "probing",
        "ranks",
        "targets",
    },
    "importance": {
        "base_layer",
        "bitmask",
        "config",
        "factors",
        "fingerprint",
        "fused_experts",
        "model_probe",
        "probing",
        "ranks",
        "scoring",
    },
    "tuner_layer": {"base_layer", "partitioned"},
    "layer": {"base_layer", "bitmask", "partitioned", "scoring", "sparse_delta", "tuner_layer"},
    "experts_layer": {"fused_experts", "layer", "scoring", "sparse_delta"},
    "column_layer": {"base_layer", "column_delta", "column_ids", "partitioned", "scoring", "tuner_layer"},
    "adapter_state": {"bitmask", "column_ids", "config", "tuner_layer"},
    "parameter_targets": {"base_layer", "config", "fused_experts", "ranks", "targets"},
    "injection": {
        "base_layer",
        "config",
        "experts_layer",
        "fingerprint",
        "fused_experts",
        "parameter_targets",
        "partitioned",
        "ranks",
        "targets",
        "tuner_layer",
    },
    "derived": {"config", "injection", "scoring"},
    "exchange": {
        "base_layer",
        "bitmask",
        "column_ids",
        "config",
        "derived",
        "fingerprint",
        "injection",
        "storage",
    },
    "combining": {"config", "tuner_layer"},
    "model": {
        "adapter_state",
        "base_layer",
        "column_layer",
        "combining",
        "derived",
        "experts_layer",
        "fingerprint",
        "importance",
        "injection",
        "layer",
        "parameter_targets",
        "ranks",
        "tuner_layer",
    },
    "registration": {"config", "experts_layer", "model", "tuner_layer"},
}
WITHOUT_PEFT = [
    "bitmask",
    "blockwise",
    "column_delta",
    "column_ids",
    "fused_experts",
    "on_demand",
    "partitioned",
    "ranks",
    "storage",
    "probing",
    "scoring",
    "sparse_delta",
]


def imported_modules(part: str) -> set[str]:
    files = [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").exists() else list((PACKAGE / part).rglob("*.py"))
    assert files
    found = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("part", ALLOWED)
def test_arrows(part: str) -> None:
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    inner = {name.split(".")[1] for name in imported_modules(part) if name.startswith("dowser_peft.")}
    assert (inner & parts) - {part} <= ALLOWED[part]


@pytest.mark.parametrize("part", WITHOUT_PEFT)
def test_the_mathematics_does_not_know_peft(part: str) -> None:
    assert not any(name.split(".")[0] == "peft" for name in imported_modules(part))


def test_importing_the_package_is_light() -> None:
    """No plotting, no command line, no kernels, no data sets."""
    heavy = ["matplotlib", "sklearn", "triton", "bitsandbytes", "typer", "datasets", "scipy"]
    script = (
        "import sys, peft, transformers\n"
        f"before = {{m for m in {heavy} if m in sys.modules}}\n"
        "import dowser_peft\n"
        f"print(sorted({{m for m in {heavy} if m in sys.modules}} - before))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
