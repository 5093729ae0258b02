"""pytest plugin: our rows in PEFT's tables, and nothing else of the suite.

Every ``pytest.mark.parametrize`` reaches pytest as a call of ``metafunc.parametrize``. The plugin stands in
front of that call and lengthens the table, so PEFT's files stay as released.
"""

from __future__ import annotations

import fnmatch
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from typing import Any

import peft
import pytest
from packaging.version import Version
from parameterized import parameterized
from transformers.integrations.peft import MIN_PEFT_VERSION

from . import replay, rows

# What PEFT's own Linear-only methods pass here tells a fault of ours from one of the environment.
BASELINE = ("Supertuning", "Shira")

QUICK_MODELS = (
    "trl-internal-testing/tiny-random-LlamaForCausalLM",
    "peft-internal-testing/tiny-random-GPT2LMHeadModel",
    "peft-internal-testing/tiny-random-BartForConditionalGeneration",
    "peft-internal-testing/tiny-random-BertModel",
    "peft-internal-testing/tiny-random-BertForSequenceClassification",
)

# fnmatch pattern of the test's name -> why it cannot run here.
DESELECTED = {
    "test_from_pretrained_cache_dir*": "downloads into a fresh cache folder; there is no hub to download from",
    "test_load_checkpoint_offline_non_default_cache_dir": "downloads into a fresh cache folder",
    "test_target_first_layer_[0-9]*_MagnitudeDowser_*": "two methods on one layer: refused by ours, as by SHiRA",
    "test_target_last_layer_[0-9]*_MagnitudeDowser_*": "two methods on one layer: refused by ours, as by SHiRA",
    "test_peft_causal_lm_extended_vocab": "asks the hub over the network whether the adapter has a tokenizer",
}
if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
    _TOO_OLD = "calls add_adapter of transformers, which wants a newer PEFT"
    DESELECTED["test_inject_from_state_dict_transformers*"] = _TOO_OLD
    DESELECTED["test_inject_from_state_dict_compiled_model*"] = _TOO_OLD


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peft conformance")
    group.addoption("--quick", action="store_true", help="one model of each family, no second row per model")
    group.addoption("--baseline", action="store_true", help=f"rows of {BASELINE} and LoRA's own tests instead")


def pytest_configure(config: pytest.Config) -> None:
    _stand_in_for_diffusers()
    _lengthen_expanded_tables()
    for marker in ("regression", "single_gpu_tests", "multi_gpu_tests", "bitsandbytes"):
        config.addinivalue_line("markers", f"{marker}: defined by PEFT")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize = metafunc.parametrize

    def with_our_rows(argnames: Any, argvalues: Any, *args: Any, **kwargs: Any) -> None:
        table = list(argvalues)
        ours = rows.rows_beside(metafunc.function.__name__, argnames, table)
        if ours and isinstance(kwargs.get("ids"), (list, tuple)):
            kwargs["ids"] = [*kwargs["ids"], *(f"Dowser{i}" for i in range(len(ours)))]
        parametrize(argnames, [*table, *ours], *args, **kwargs)

    metafunc.parametrize = with_our_rows  # type: ignore[method-assign]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    prepare_suite()
    baseline, quick = config.getoption("baseline"), config.getoption("quick")
    kept, dropped = [], []
    for item in items:
        if wanted(item, BASELINE if baseline else ("Dowser",), quick):
            kept.append(item)
        else:
            dropped.append(item)
    config.hook.pytest_deselected(items=dropped)
    without = {item.path.name for item in dropped} - {item.path.name for item in kept}
    items[:] = kept + [NothingLeft.from_parent(items[0].session, name=f"nothing left in {f}") for f in sorted(without)]


class NothingLeft(pytest.Item):
    """Fails for a file of the suite that has no test for us: silence would look like success."""

    def runtest(self) -> None:
        pytest.fail("PEFT has renamed its tables or tests, or the file is not about methods like ours", pytrace=False)


def wanted(item: pytest.Item, class_prefixes: tuple[str, ...], quick: bool) -> bool:
    """Whether a collected test runs: it is about the wanted methods and can run here."""
    if any(fnmatch.fnmatch(item.name, pattern) for pattern in DESELECTED):
        return False
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if not rows.mentions(tuple(params.values()), *class_prefixes):
        return replay.applies(item) or any(name in item.name for name in class_prefixes)
    if not quick or "model_id" not in params or "/" not in params["model_id"]:
        return True
    return params["model_id"] in QUICK_MODELS and "random" not in params.get("config_kwargs", {}).values()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if item.config.getoption("baseline"):
        return (yield)
    with replay.in_place_of_lora(item):
        return (yield)


def _lengthen_expanded_tables() -> None:
    """The mixed-adapter tests use ``parameterized.expand``, which makes its tests while their file is imported."""
    expand = parameterized.expand

    def with_our_rows(table: Any, *args: Any, **kwargs: Any) -> Any:
        table = list(table)
        return expand([*table, *rows.pairs_beside(table)], *args, **kwargs)

    parameterized.expand = with_our_rows


def prepare_suite() -> None:
    """Three helpers of the suite, which its tests look up when they run.

    ``hub_online_once`` goes online the first time a test names a model; here everything counts as seen. And two
    helpers skip a test for methods without Conv1D layers, or (whatever the method) for models without biases:
    neither is a reason for ours.
    """
    for name, module in list(sys.modules.items()):
        if not name.startswith("peft_tests."):
            continue
        if hasattr(module, "_HUB_MODEL_ACCESSES"):
            module._HUB_MODEL_ACCESSES = _Everything()
        for helper in ("_skip_if_conv1d_not_supported", "check_beft_config"):
            if hasattr(module, helper):
                setattr(module, helper, _keep_ours(getattr(module, helper)))


def _keep_ours(skip: Any) -> Any:
    def skip_others(*args: Any) -> None:
        if not rows.mentions(args, "Dowser"):
            skip(*args)

    return skip_others


class _Everything(dict):
    """A dict that contains whatever it is asked for."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: object) -> int:
        return 1


def _stand_in_for_diffusers() -> None:
    """PEFT's shared test code imports diffusers for the tests of image models, none of which run here."""
    try:
        import diffusers  # noqa: F401
    except ImportError:
        module = types.ModuleType("diffusers")
        module.__spec__ = importlib.machinery.ModuleSpec("diffusers", loader=None)
        module.__version__ = "0"  # type: ignore[attr-defined]
        module.__getattr__ = lambda name: type(name, (), {})  # type: ignore[method-assign]
        sys.modules["diffusers"] = module
