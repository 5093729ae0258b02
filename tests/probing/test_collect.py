"""The probe as a whole: every kind of model, real batches, and a model that leaves as it came."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn
from transformers import BatchEncoding

from dowser_peft import probe
from dowser_peft.probing.collect import random_signs
from dowser_peft.targets import default_targets
from tests import models
from tests.probing.helpers import collect, fixed_signs, prompts

EVERY = models.CAUSAL + models.MULTIMODAL + models.SEQ2SEQ + models.ENCODERS
QUICK: dict[str, Any] = {"num_prompts": 5, "num_probes": 2, "prompt_length": 6, "progress": False}


def factors(statistics: Any) -> dict[str, torch.Tensor]:
    """All numbers of a probe, whoever shares them."""
    return {
        f"{kind}.{name}": getattr(statistics, kind)(name).float()
        for name in statistics.module_names
        for kind in ("activation", "sensitivity")
    }


def assert_same(found: Any, expected: Any, rtol: float = 1e-4) -> None:
    """Statistics of :func:`collect`, equal up to rounding."""
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert one.keys() == other.keys()
        for name in one:
            scale = float(other[name].abs().max())
            torch.testing.assert_close(
                one[name], other[name], rtol=rtol, atol=rtol * scale, msg=lambda m, n=name: n + m
            )


@pytest.mark.parametrize("build", EVERY)
def test_every_kind_of_model_can_be_probed_without_data(build: Callable[[], nn.Module]) -> None:
    model = build()
    statistics = probe(model, **QUICK, target_modules=default_targets(model))  # experts: test_experts.py
    assert statistics.module_names == default_targets(model)
    for name, value in factors(statistics).items():
        assert value.shape[0] == 5
        assert bool(value.isfinite().all()) and bool((value >= 0).all())
        assert bool(value.any(1).all()), f"{name} is zero for a prompt"
        assert len(value.unique(dim=0)) > 1, f"{name} is the same for every prompt"
    assert all(value.dtype == torch.bfloat16 for value in statistics.activations.values())
    assert all(value.dtype == torch.bfloat16 for value in statistics.sensitivities.values())


@pytest.mark.parametrize("build", EVERY)
def test_batch_size_does_not_change_the_result(build: Callable[[], nn.Module]) -> None:
    model = build()
    expected = probe(model, **QUICK, batch_size=1)
    for batch_size in (3, 5, None):
        found = factors(probe(model, **QUICK, batch_size=batch_size))
        for name, value in factors(expected).items():
            torch.testing.assert_close(found[name], value, rtol=2e-2, atol=1e-3 * float(value.max()))


def padded(rows: list[torch.Tensor], side: str, length: int = 0) -> dict[str, torch.Tensor]:
    """Prompts of unequal length as one padded batch."""
    length = max(length, *(len(row) for row in rows))
    ids = torch.full((len(rows), length), models.PAD)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[index, where], mask[index, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def ragged(lengths: tuple[int, ...] = (4, 7, 2), seed: int = 0) -> list[torch.Tensor]:
    return [prompts(1, length, seed + index)[0] for index, length in enumerate(lengths)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "build", [models.tiny_llama, models.tiny_gpt2, models.tiny_opt, models.tiny_llava, models.tiny_bert_encoder]
)
def test_padding_is_excluded(build: Callable[[], nn.Module], side: str) -> None:
    if side == "left" and build is models.tiny_bert_encoder:
        pytest.skip("BERT counts positions from the first column")
    model, rows = build(), ragged()
    batch = padded(rows, side)
    if build is models.tiny_gpt2:  # does not derive positions from the mask
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    together = collect(model, batches=[batch])
    alone = collect(model, batches=[{"input_ids": row[None]} for row in rows])
    if side == "left" and build in (models.tiny_llama, models.tiny_llava):  # relative positions are enough
        assert bool((batch["attention_mask"][:, 0] == 0).any())
    assert_same(together, alone)


def test_padding_is_excluded_for_the_authors_estimator() -> None:
    model, rows = models.tiny_llama(), ragged((4, 7, 2, 5, 3))
    together = collect(model, batches=[padded(rows, "right")], estimator="mean_abs")
    alone = collect(model, batches=[{"input_ids": row[None]} for row in rows], estimator="mean_abs")
    assert_same(together, alone)


@pytest.mark.parametrize("target", ["decoder_input_ids", "labels"])
@pytest.mark.parametrize("build", [models.tiny_t5, models.tiny_bart])
@pytest.mark.parametrize("lengths", [((4, 7, 2), (3, 2, 7)), ((4, 7, 2), (3, 2, 5))], ids=["equal", "unequal"])
def test_padding_of_source_and_target_is_excluded(
    build: Callable[[], nn.Module], target: str, lengths: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    """Also where both have the same length, so that only the place in the model tells them apart."""
    model, sources, targets = build(), ragged(lengths[0]), ragged(lengths[1], seed=9)
    batch = padded(sources, "right")
    written = padded(targets, "right")
    if target == "labels":
        batch["labels"] = written["input_ids"].masked_fill(written["attention_mask"] == 0, -100)
    else:
        batch |= {f"decoder_{key}": value for key, value in written.items()}
    alone = [{"input_ids": s[None], target: t[None]} for s, t in zip(sources, targets, strict=True)]
    assert_same(collect(model, batches=[batch]), collect(model, batches=alone))


def test_padding_of_whisper_text_is_excluded() -> None:
    model, rows, audio = models.tiny_whisper(), ragged(), torch.randn(3, 8, 24)
    text = {f"decoder_{key}": value for key, value in padded(rows, "right").items()}
    alone = [
        {"input_features": audio[index : index + 1], "decoder_input_ids": row[None]} for index, row in enumerate(rows)
    ]
    assert_same(collect(model, batches=[{"input_features": audio} | text]), collect(model, batches=alone))


def test_padding_that_cannot_be_told_from_tokens_is_refused() -> None:
    model, rows = models.tiny_nvila(), ragged()
    image = torch.randn(3, 3, 8, 8)
    for side in ("left", "right"):
        with pytest.raises(ValueError, match="one prompt each, without padding"):
            collect(model, batches=[padded(rows, side) | {"pixel_values": image}])
    single = [{"input_ids": row[None], "pixel_values": image[i : i + 1]} for i, row in enumerate(rows)]
    equal = {"input_ids": torch.stack([rows[1], rows[1]]), "pixel_values": image[:2]}
    assert collect(model, batches=single)[1]["llm.model.layers.0.mlp.up_proj"].shape[0] == 3
    assert collect(model, batches=[equal])[1]["llm.model.layers.0.mlp.up_proj"].shape[0] == 2


def test_a_multimodal_model_can_be_probed_with_images() -> None:
    model = models.tiny_llava()
    ids = torch.cat([torch.full((2, 4), models.IMAGE), prompts(2, 3)], dim=1)
    images = torch.randn(2, 3, 8, 8)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images, "labels": ids}
    names = [*default_targets(model), "model.multi_modal_projector.linear_1"]
    together = collect(model, names, batches=[batch])
    assert_same(
        together, collect(model, names, batches=[{k: v[i : i + 1] for k, v in batch.items()} for i in range(2)])
    )
    other = collect(model, names, batches=[batch | {"pixel_values": images + 1}])
    name = names[0]
    assert not torch.equal(other[0][name], together[0][name])


def test_a_module_that_some_batches_do_not_use_is_zero_for_them() -> None:
    model = models.tiny_llava()
    name = "model.multi_modal_projector.linear_1"
    ids = torch.cat([torch.full((1, 4), models.IMAGE), prompts(1, 3)], dim=1)
    with_image = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8)}
    activation, sensitivity, _ = collect(model, [name], batches=[with_image, with_image])
    assert bool(activation[name].any(1).all())
    names = [*default_targets(model)[:1], name]
    activation, sensitivity, _ = collect(model, names, batches=[{"input_ids": prompts(2)}, with_image])
    assert activation[name].any(1).tolist() == sensitivity[name].any(1).tolist() == [False, False, True]


def test_a_module_that_is_never_called_is_named() -> None:
    model = models.tiny_llava()
    name = "model.multi_modal_projector.linear_1"
    with pytest.raises(ValueError, match=rf"{name}.* not called .*exclude_modules"):
        probe(model, **QUICK, target_modules=[*default_targets(model), name])
    with pytest.raises(ValueError, match=f"{name}.* not called"):
        collect(model, [*default_targets(model), name], batches=[{"input_ids": prompts()}])


def test_forms_of_batches() -> None:
    model, ids = models.tiny_llama(), prompts(4)
    expected = collect(model, batches=[{"input_ids": ids}])
    forms: dict[str, Any] = {
        "tensor": [ids],
        "tuple": [(ids,)],
        "list": [[ids[:3]], [ids[3:]]],
        "tokenizer output": [BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})],
        "with labels": [{"input_ids": ids, "labels": ids}],
        "generator": ({"input_ids": row} for row in ids.split(3)),
        "data loader": torch.utils.data.DataLoader(ids, batch_size=3),
        "embeddings": [{"inputs_embeds": model.get_input_embeddings()(ids)}],
    }
    for form, batches in forms.items():
        try:
            assert_same(collect(model, batches=batches), expected)
        except Exception as error:
            raise AssertionError(form) from error
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "empty"),
        (iter(()), ValueError, "empty"),
        (prompts(), TypeError, r"batches=\[batch\]"),
        ({"input_ids": prompts()}, TypeError, r"batches=\[batch\]"),
        (["a text"], TypeError, "must be a tensor or hold tensors"),
        ([3], TypeError, "must be a tensor or hold tensors"),
        ([{"text": "a text"}], TypeError, "must be a tensor or hold tensors"),
    ],
)
def test_wrong_batches_are_refused(batches: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        probe(models.tiny_llama(), batches=batches, progress=False)


def test_a_plain_model_needs_data() -> None:
    model = models.tiny_mlp()
    with pytest.raises(ValueError, match="target_modules"):
        probe(model, progress=False)
    with pytest.raises(ValueError, match=r"batches=.*importance='magnitude'"):
        probe(model, target_modules=["0", "2"], progress=False)
    statistics = probe(model, target_modules=["0", "2"], batches=[torch.randn(4, 6)], progress=False)
    assert statistics.source == "batches"
    assert (statistics.num_prompts, statistics.prompt_length) == (4, 0)
    assert statistics.shape("2") == (5, 7)


def test_a_wrapped_language_model_is_probed_by_its_last_token() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **inputs: Any) -> Any:
            return self.inner(**inputs).logits

    model, ids = models.tiny_llama(), prompts()
    found = collect(Wrapper(model), ["inner.model.layers.1.mlp.up_proj"], batches=[{"input_ids": ids}])
    expected = collect(model, ["model.layers.1.mlp.up_proj"], batches=[{"input_ids": ids}])
    torch.testing.assert_close(next(iter(found[1].values())), next(iter(expected[1].values())))
    assert probe(Wrapper(model), **QUICK).module_names[0] == "inner.model.layers.0.self_attn.q_proj"


def test_an_output_without_tensors_is_refused() -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            self.layer(x)
            return {"answer": None}

    with pytest.raises(ValueError, match="without a tensor to probe"):
        collect(Silent(), ["layer"], batches=[torch.ones(1, 2)])


def test_an_output_that_does_not_depend_on_the_targets_is_refused() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return self.layer(x)

    with pytest.raises(ValueError, match="does not depend on the target modules"):
        collect(Detached(), ["layer"], batches=[torch.ones(1, 2)])


def test_a_classifier_without_padding_token_can_be_probed() -> None:
    model = models.tiny_llama_classifier(pad_token_id=None)
    together, alone = probe(model, **QUICK, batch_size=5), probe(model, **QUICK, batch_size=1)
    assert model.config.pad_token_id is None
    for name, value in factors(alone).items():
        torch.testing.assert_close(factors(together)[name], value, rtol=2e-2, atol=1e-3 * float(value.max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    ids = prompts()
    exact = collect(models.tiny_llama(), batches=[{"input_ids": ids}])
    model = models.tiny_llama().to(dtype)
    found = collect(model, batches=[{"input_ids": ids}])
    assert next(model.parameters()).dtype == dtype
    for one, other in zip(found[:2], exact[:2], strict=True):
        for name in one:
            assert one[name].dtype == torch.float32
            error = (one[name] - other[name]).norm() / other[name].norm()
            assert error < {torch.bfloat16: 0.06, torch.float16: 0.01}[dtype], name
    assert probe(model, **QUICK).num_prompts == 5


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch"])
def test_offloaded_models(how: str, tmp_path: Any) -> None:
    expected = factors(probe(models.tiny_llama(), **QUICK))
    model = models.tiny_llama()
    if how == "cpu_offload":
        cpu_offload(model, execution_device="cpu")
    elif how == "disk_offload":
        disk_offload(model, str(tmp_path), execution_device="cpu")
    else:
        device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        device_map |= {"model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk"}
        dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    devices = {name: parameter.device.type for name, parameter in model.named_parameters()}
    assert "meta" in devices.values()
    found = factors(probe(model, **QUICK))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert {name: parameter.device.type for name, parameter in model.named_parameters()} == devices


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = models.tiny_llama()
    with pytest.raises(ValueError, match="meta device"):
        probe(model, **QUICK)


def test_a_4_bit_model() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = models.tiny_llama(hidden_size=64, intermediate_size=64)
    for name in default_targets(model):
        parent, _, child = name.rpartition(".")
        old = model.get_submodule(name)
        new = bitsandbytes.nn.Linear4bit(
            old.in_features, old.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        new.weight = bitsandbytes.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        setattr(model.get_submodule(parent), child, new.to("cpu"))
    statistics = probe(model, **QUICK)
    assert all(bool(value.any(1).all()) for value in factors(statistics).values())


@pytest.mark.parametrize("prepare", ["gradient_checkpointing", "input_require_grads", "both", "kbit"])
def test_a_model_prepared_for_training(prepare: str) -> None:
    """Input gradients required at the embeddings: then no target module starts the graph."""
    from peft import prepare_model_for_kbit_training

    expected = factors(probe(models.tiny_llama(), **QUICK))
    model = models.tiny_llama().train()
    if prepare in ("gradient_checkpointing", "both"):
        model.gradient_checkpointing_enable()
    if prepare in ("input_require_grads", "both"):
        model.enable_input_require_grads()
    if prepare == "kbit":
        model.is_loaded_in_4bit = True
        prepare_model_for_kbit_training(model)
    found = factors(probe(model, **QUICK))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert model.training
    assert model.is_gradient_checkpointing == (prepare != "input_require_grads")
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inside_a_block_without_gradients(context: Any) -> None:
    model = models.tiny_llama()
    expected = factors(probe(model, **QUICK))
    with context():
        found = factors(probe(model, **QUICK))
    for name, value in expected.items():
        assert torch.equal(found[name], value)


def test_random_signs_are_those_of_seed_and_prompt() -> None:
    """Of a seed, torch's generator uses the low 32 bits alone."""
    output = torch.zeros(3, 64)

    def signs(seed: int, first_prompt: int = 0) -> torch.Tensor:
        return torch.stack(list(random_signs(output, None, 2, seed, first_prompt)))

    drawn = [signs(seed) for seed in (0, 1, 2, -1, 2**32 - 2, 2**40 + 3)]
    assert len(torch.cat([draw.flatten(0, 1) for draw in drawn]).unique(dim=0)) == 6 * 2 * 3
    assert torch.equal(signs(1, 1)[:, :2], signs(1)[:, 1:])  # whatever the batch
    assert not bool((drawn[0] == 0).any())


def test_seeds() -> None:
    model = models.tiny_llama()
    first, again = factors(probe(model, **QUICK, seed=1)), factors(probe(model, **QUICK, seed=1))
    other = factors(probe(model, **QUICK, seed=2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    torch.manual_seed(123)
    assert all(torch.equal(first[name], value) for name, value in factors(probe(model, **QUICK, seed=1)).items())
    for seed in (-1, 2**32 + 5, 2**63 - 1):
        assert probe(model, **QUICK, seed=seed).seed == seed


def test_the_data_of_a_prompt_do_not_depend_on_its_neighbours() -> None:
    """Random signs belong to the prompt's number, so that batches can be cut anywhere."""
    model, ids = models.tiny_bert_encoder(), prompts(5)
    expected = collect(model, batches=[{"input_ids": ids}])
    assert_same(collect(model, batches=[{"input_ids": part} for part in ids.split(2)]), expected)


def test_running_out_of_memory_halves_the_batch() -> None:
    model = models.tiny_llama()
    expected = factors(probe(model, **QUICK, batch_size=1))
    sizes: list[int] = []

    def limited(_module: Any, args: Any, kwargs: Any) -> None:
        rows = kwargs["inputs_embeds"].shape[0]
        if torch.is_grad_enabled():
            sizes.append(rows)
            if rows > 1:
                raise torch.OutOfMemoryError("not enough")

    handle = model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: limited(module, args, {"inputs_embeds": args[0]}), with_kwargs=True
    )
    found = factors(probe(model, **QUICK, batch_size=5))
    assert sizes == [5, 2, 1, 1, 1, 1, 1]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    handle.remove()

    def never(*_: Any) -> None:
        raise torch.OutOfMemoryError("not enough")

    model.model.layers[0].register_forward_pre_hook(lambda *_: never() if torch.is_grad_enabled() else None)
    with pytest.raises(torch.OutOfMemoryError, match="prompt_length"):
        probe(model, **QUICK)


# The model leaves as it came.

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def snapshot(model: nn.Module) -> dict[str, Any]:
    configs = {name: module.config for name, module in model.named_modules() if hasattr(module, "config")}
    return {
        "mode": {name: module.training for name, module in model.named_modules()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "grad": {name: parameter.grad is not None for name, parameter in model.named_parameters()},
        "dtype": {name: parameter.dtype for name, parameter in model.named_parameters()},
        "identity": {name: id(parameter) for name, parameter in model.named_parameters()},
        "sum": {name: str(float(parameter.detach().double().sum())) for name, parameter in model.named_parameters()},
        "hooks": {name: [list(getattr(module, kind)) for kind in _HOOKS] for name, module in model.named_modules()},
        "checkpointing": {
            name: getattr(module, "gradient_checkpointing", None) for name, module in model.named_modules()
        },
        "configs": {name: (id(config), str(config.to_dict())) for name, config in configs.items()},
        "generation": {
            name: (id(module.generation_config), str(module.generation_config.to_dict()))
            for name, module in model.named_modules()
            if getattr(module, "generation_config", None) is not None
        },
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "random": torch.get_rng_state().tolist(),
        "grad mode": torch.is_grad_enabled(),
    }


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before = snapshot(model)
    yield
    after = snapshot(model)
    for what in before:
        assert after[what] == before[what], what


def unusual(model: nn.Module) -> nn.Module:
    """A state that must survive: a mix of modes and flags, foreign hooks, an odd generation config."""
    model.train()
    getattr(model, "gradient_checkpointing_enable", lambda: None)()
    modules = list(model.modules())
    modules[len(modules) // 2].eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
    modules[-1].register_forward_hook(lambda *_: None)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.update(num_beams=3, min_new_tokens=40, max_length=7, do_sample=False, use_cache=False)
        model.generation_config.update(no_repeat_ngram_size=2, forced_eos_token_id=2, renormalize_logits=True)
    return model


LEAVES = [models.tiny_llama, models.tiny_llava, models.tiny_nvila, models.tiny_bert, models.tiny_t5, models.tiny_vit]


@pytest.mark.parametrize("build", [*LEAVES, models.tiny_llama_classifier])
def test_the_model_leaves_as_it_came(build: Callable[..., nn.Module]) -> None:
    model = unusual(build(pad_token_id=None) if build is models.tiny_llama_classifier else build())
    with unchanged(model):
        found = factors(probe(model, **QUICK))
    plain = build(pad_token_id=None) if build is models.tiny_llama_classifier else build()
    for name, value in factors(probe(plain, **QUICK)).items():  # and nothing of its state mattered
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("moment", ["sampling", "forward", "backward"])
@pytest.mark.parametrize("build", [models.tiny_llama, models.tiny_llava, models.tiny_nvila])
def test_the_model_leaves_as_it_came_after_an_exception(
    build: Callable[[], nn.Module], moment: str, error: type[BaseException]
) -> None:
    model = unusual(build())
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise error("stop")

    def on_forward(_module: Any, _args: Any, output: torch.Tensor) -> None:
        if moment == "backward" and output.requires_grad:
            output.register_hook(fail)
        elif (moment == "forward") == torch.is_grad_enabled() and moment != "backward":
            fail()

    model.get_submodule(default_targets(model)[-1]).register_forward_hook(on_forward)
    with unchanged(model), pytest.raises(error, match="stop"):
        probe(model, **QUICK, batch_size=2)
    assert len(calls) == 2


def test_nothing_of_a_probe_stays_in_memory() -> None:
    model = models.tiny_llama()
    activations: list[weakref.ref[torch.Tensor]] = []

    def note(_module: Any, args: Any, output: torch.Tensor) -> None:
        activations.extend([weakref.ref(args[0]), weakref.ref(output)])

    handles = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, nn.Linear)]
    gc.collect()
    gc.disable()
    try:
        statistics = probe(model, **QUICK)
        assert activations
        alive = sum(reference() is not None for reference in activations)
    finally:
        gc.enable()
    assert alive == 0, "kept by a reference cycle or for good"
    for handle in handles:
        handle.remove()
    del statistics
    gc.collect()
    tensors = sum(issubclass(type(value), torch.Tensor) for value in gc.get_objects())
    probe(model, **QUICK)
    gc.collect()
    assert sum(issubclass(type(value), torch.Tensor) for value in gc.get_objects()) <= tensors


# NaN and inf


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("weight", "place"),
    [
        ("model.embed_tokens.weight", r"input of module 'model\.layers\.0\.self_attn\.q_proj'"),
        ("model.layers.0.self_attn.k_proj.weight", r"output of module 'model\.layers\.0\.self_attn\.k_proj'"),
        ("model.layers.0.mlp.down_proj.weight", r"output of module 'model\.layers\.0\.mlp\.down_proj'"),
        ("model.layers.1.input_layernorm.weight", r"input of module 'model\.layers\.1\.self_attn\.q_proj'"),
        ("model.layers.1.mlp.down_proj.weight", r"output of module 'model\.layers\.1\.mlp\.down_proj'"),
        ("lm_head.weight", r"output of the model, though of no target module,"),
    ],
)
@pytest.mark.parametrize("own_prompts", [True, False])
def test_the_first_module_with_nan_or_inf_is_named(weight: str, place: str, value: float, own_prompts: bool) -> None:
    model = models.tiny_llama()
    model.get_parameter(weight).data.fill_(value)
    options: dict[str, Any] = {} if own_prompts else {"batches": [{"input_ids": prompts()}]}
    with unchanged(model), pytest.raises(ValueError, match=f"{place} holds NaN or inf"):
        probe(model, **QUICK, **options)


@pytest.mark.parametrize("build", [models.tiny_t5, models.tiny_llava, models.tiny_nvila, models.tiny_bert])
def test_nan_is_found_in_every_kind_of_model(build: Callable[[], nn.Module]) -> None:
    model = build()
    name = default_targets(model)[-2]
    model.get_submodule(name).weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"output of module '{name}' holds NaN or inf"):
        probe(model, **QUICK)


def test_overflow_in_half_precision_is_named() -> None:
    model = models.tiny_llama().half()
    model.model.layers[0].mlp.up_proj.weight.data *= 1e5
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.up_proj'.*wider dtype"):
        probe(model, **QUICK)


def test_a_gradient_that_is_not_finite_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last((self.first(x) * 0).sqrt())  # the slope of a root at 0 is infinite

    with pytest.raises(ValueError, match="output gradient of module 'first'"):
        collect(Root(), ["first", "last"], batches=[torch.ones(1, 2)])
    fixed_signs(monkeypatch, torch.full((1, 2), float("inf")))
    with pytest.raises(ValueError, match="output gradient of module 'last'"):
        collect(Root(), ["first", "last"], batches=[torch.ones(1, 2)], num_probes=1)
