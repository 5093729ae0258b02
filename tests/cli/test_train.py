"""``dowser-peft train``: text and images end to end, resuming, retention; wrong input is in test_train_refusals.py."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, load_dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from dowser_peft import DowserConfig, ProbeStatistics, importance, probe
from dowser_peft.cli.training.data import load_data
from dowser_peft.cli.training.retention import held_out, token_scores
from tests.cli.train_helpers import (
    ANSWERS,
    FLAGS,
    PROMPTS,
    adapter_tensors,
    as_flags,
    conversations,
    images,
    run_in_process,
    write_images,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture(scope="module")
def text_run(llama_text: Path, text_file: Path, prompts_file: Path, tmp_path_factory) -> dict[str, Any]:
    """Six steps with two checkpoints, and retention measured."""
    flags = as_flags(FLAGS, model_name_or_path=llama_text, dataset_name=text_file, retention_dataset=prompts_file)
    return run_in_process(
        "train", *flags, "--output_dir", tmp_path_factory.mktemp("run") / "out", "--save_steps", 3, "--json"
    )


def test_it_trains_what_trl_would(text_run: dict[str, Any], llama_text: Path, text_file: Path, tmp_path: Path) -> None:
    """The same arguments in Python: bit for bit the same adapter, although the command measured retention too."""
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(llama_text, dtype="bfloat16"),
        args=SFTConfig(
            output_dir=str(tmp_path), max_steps=6, learning_rate=1e-3, save_strategy="no", use_cpu=True, report_to=[]
        ),
        train_dataset=load_dataset("json", data_files=str(text_file), split="train"),
        processing_class=AutoTokenizer.from_pretrained(llama_text),
        peft_config=DowserConfig(num_prompts=4, num_probes=2, prompt_length=8),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    expected, found = adapter_tensors(tmp_path / "adapter"), adapter_tensors(text_run["output"])
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    values = torch.cat([found[key] for key in found if key.endswith("dowser_values")])
    assert values.dtype == torch.float32 and values.abs().max() > 0
    assert text_run["trained"] == values.numel() and text_run["steps"] == 6 and text_run["examples"] == len(PROMPTS)


def test_merged_result_is_a_plain_model(text_run: dict[str, Any], llama_text: Path, dowser, tmp_path: Path) -> None:
    result = dowser("merge", text_run["output"], "-o", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    ids = torch.tensor([[1, 10, 11, 12]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(llama_text)
    untouched = base(ids).logits
    adapted = PeftModel.from_pretrained(base, text_run["output"])
    assert torch.equal(merged(ids).logits, adapted(ids).logits) and not torch.equal(merged(ids).logits, untouched)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("w10 w11")["input_ids"] == [10, 11]


def test_resuming_equals_an_uninterrupted_run(
    text_run: dict[str, Any], llama_text: Path, text_file: Path, dowser, tmp_path: Path, monkeypatch
) -> None:
    shutil.copytree(Path(text_run["output"]) / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-5").mkdir()  # the machine went down while it was written
    monkeypatch.setattr(importance, "probe", lambda *_, **__: pytest.fail("probed again"))
    flags = as_flags(FLAGS, model_name_or_path=llama_text, dataset_name=text_file, output_dir=tmp_path)
    result = dowser("train", *flags, "--save_steps", 3, "--resume_from_checkpoint", "true")
    assert result.exit_code == 0, result.output
    assert "warning: checkpoint-5 is not complete" in result.stderr and "going on from checkpoint-3" in result.stderr
    assert "6, 6 epochs; went on from" in result.stdout
    for folder in ("", "checkpoint-6"):
        expected, found = adapter_tensors(Path(text_run["output"]) / folder), adapter_tensors(tmp_path / folder)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_yaml_file(text_run: dict[str, Any], llama_text: Path, text_file: Path, dowser_json, tmp_path: Path) -> None:
    """All arguments from a file, one of them overruled by a flag; a target pattern as a mapping."""
    settings = FLAGS | {"model_name_or_path": str(llama_text), "dataset_name": str(text_file), "max_steps": 1}
    settings |= {"output_dir": str(tmp_path / "out"), "learning_rate": "1e-3", "save_strategy": "no"}
    settings |= {"rho": 0.2, "rho_pattern": {"down_proj": 0.05}, "target_modules": ["q_proj", "down_proj"]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    result = dowser_json("train", f"--config={tmp_path / 'run.yaml'}", "--max-steps", 2)
    assert result["steps"] == 2 and not list((tmp_path / "out").glob("checkpoint-*"))
    config = DowserConfig.from_pretrained(tmp_path / "out")
    assert (config.rho, config.rho_pattern, config.num_prompts) == (0.2, {"down_proj": 0.05}, 4)
    assert config.target_modules == {"q_proj", "down_proj"}
    sizes = {key.split(".")[-2]: value.numel() for key, value in adapter_tensors(tmp_path / "out").items()}
    values = {k: v.numel() for k, v in adapter_tensors(tmp_path / "out").items() if k.endswith("dowser_values")}
    assert set(sizes) == {"q_proj", "down_proj"}
    assert sorted(set(values.values())) == [round(0.05 * 16 * 24), round(0.2 * 16 * 16)]


def test_statistics_of_an_earlier_probe(llama_text: Path, text_file: Path, dowser_json, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_text)
    statistics = probe(model, num_prompts=5, num_probes=3, prompt_length=6, seed=9, progress=False)
    statistics.save(tmp_path / "statistics.safetensors")
    assert isinstance(ProbeStatistics.load(tmp_path / "statistics.safetensors"), ProbeStatistics)
    flags = as_flags(FLAGS, model_name_or_path=llama_text, dataset_name=text_file, output_dir=tmp_path / "out")
    flags += ["--importance", tmp_path / "statistics.safetensors", "--max_steps", 1, "--save_strategy", "no"]
    dowser_json("train", *flags)
    config = DowserConfig.from_pretrained(tmp_path / "out")
    assert (config.num_prompts, config.num_probes, config.prompt_length, config.seed) == (5, 3, 6, 9)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| prompts | N = 5 of 6 tokens |" in card and "| seed | 9 |" in card


def test_4bit_base_keeps_its_values_in_float32(llama_text: Path, text_file: Path, dowser_json, tmp_path: Path) -> None:
    flags = as_flags(FLAGS, model_name_or_path=llama_text, dataset_name=text_file, output_dir=tmp_path / "out")
    dowser_json("train", *flags, "--load_in_4bit", "--use_bnb_nested_quant", "--dtype", "auto")
    values = torch.cat([v for k, v in adapter_tensors(tmp_path / "out").items() if k.endswith("dowser_values")])
    assert values.dtype == torch.float32 and not torch.equal(values, values.bfloat16().float())


@pytest.fixture(scope="module")
def image_run(llava_processor: Path, tmp_path_factory) -> dict[str, Any]:
    """Rows as in LLaVA's files, with paths of images; the last row has none."""
    folder = tmp_path_factory.mktemp("vision")
    write_images(folder / "pictures")
    train, kept = conversations()[:3], conversations()[:1]
    without = {"conversations": [{"from": "human", "value": PROMPTS[3]}, {"from": "gpt", "value": ANSWERS[3]}]}
    write_rows(folder / "train.jsonl", [*train, without])
    write_rows(folder / "kept.jsonl", kept)
    flags = as_flags(FLAGS, model_name_or_path=llava_processor, dataset_name=folder / "train.jsonl")
    flags += ["--retention_dataset", folder / "kept.jsonl", "--image_folder", folder / "pictures"]
    return run_in_process("train", *flags, "--output_dir", folder / "out", "--save_strategy", "no", "--json")


def test_images_and_conversations(image_run: dict[str, Any], llava_processor: Path, dowser, tmp_path: Path) -> None:
    tensors = adapter_tensors(image_run["output"])
    assert image_run["examples"] == 4 and tensors and all("language_model" in key for key in tensors)
    assert AutoProcessor.from_pretrained(image_run["output"]).image_token == "<image>"
    assert dowser("merge", image_run["output"], "-o", tmp_path / "merged").exit_code == 0
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    inputs = {"input_ids": torch.tensor([[1, 5, 5, 5, 5, 10]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    inputs["pixel_values"] = inputs["pixel_values"].to(merged.dtype)
    base = AutoModelForImageTextToText.from_pretrained(llava_processor, dtype=merged.dtype)
    adapted = PeftModel.from_pretrained(base, image_run["output"])
    assert torch.equal(merged(**inputs).logits, adapted(**inputs).logits)


def test_retention_with_images_by_hand(image_run: dict[str, Any], llava_processor: Path) -> None:
    """All words of the conversation count, after the four tokens of the picture, which do not."""
    text = f"<image> {PROMPTS[0]}{ANSWERS[0]}"
    count = len(text.split()) - 1
    inputs = AutoProcessor.from_pretrained(llava_processor)(images=images()[0], text=text, return_tensors="pt")
    base = AutoModelForImageTextToText.from_pretrained(llava_processor, dtype=torch.bfloat16)
    for name in ("base", "tuned"):
        model = base if name == "base" else PeftModel.from_pretrained(base, image_run["output"])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = model(**inputs).logits[0, -count - 1 : -1].float()
        loss = F.cross_entropy(logits, inputs["input_ids"][0, -count:]).item()
        assert image_run["retention"][name]["loss"] == pytest.approx(loss, rel=1e-6)
    assert image_run["retention"]["tokens"] == count and image_run["retention"]["examples"] == 1


def test_loss_on_the_answers_of_conversations(llava_processor: Path, tmp_path: Path) -> None:
    """Retention counts what training counts: the answers, marked by the chat template."""
    write_images(tmp_path / "pictures")
    file = write_rows(tmp_path / "pictures" / "data.jsonl", conversations())
    flags = as_flags(FLAGS, model_name_or_path=llava_processor, dataset_name=file, output_dir=tmp_path / "out")
    flags += ["--dataset_train_split", "train[:2]", "--retention_dataset", file, "--retention_split", "train[2:]"]
    found = run_in_process("train", *flags, "--assistant_only_loss", "--max_steps", 1, "--json")
    assert found["retention"]["tokens"] == sum(len(answer.split()) for answer in ANSWERS[2:])


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_llava_files(tmp_path: Path, streaming: bool) -> None:
    """Paths become pictures and placeholders parts of the text, where they were; other columns stay."""
    write_images(tmp_path / "pictures")
    row = {"id": 7, "image": "1.png", "conversations": [{"from": "human", "value": "w1 <image>\nw2"}]}
    file = write_rows(tmp_path / "pictures" / "data.jsonl", [row])
    found = next(iter(load_data(str(file), None, "train", "text", streaming=streaming)))
    parts = [("text", "w1 "), ("image", None), ("text", "w2")]
    assert [(part["type"], part["text"]) for part in found["messages"][0]["content"]] == parts
    assert found["messages"][0]["role"] == "user" and found["id"] == 7
    assert np.array_equal(np.asarray(found["images"][0]), np.asarray(images()[1]))


def test_retention_of_text_by_hand(text_run: dict[str, Any], llama_text: Path) -> None:
    """Prompts do not count, answers with their end do: the mean over all such tokens, not over examples."""
    tokenizer = AutoTokenizer.from_pretrained(llama_text)
    base = AutoModelForCausalLM.from_pretrained(llama_text, dtype=torch.bfloat16)
    report = text_run["retention"]
    for name in ("base", "tuned"):
        model = base if name == "base" else PeftModel.from_pretrained(base, text_run["output"])
        losses, right = [], []
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
            ids = tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id]
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                scores = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            for place in range(len(prompt.split()), len(ids)):
                losses.append(-scores[place - 1, ids[place]].item())
                right.append(scores[place - 1].argmax().item() == ids[place])
        assert report[name]["loss"] == pytest.approx(sum(losses) / len(losses), rel=2e-3)  # bf16: padding changes sums
        assert report[name]["accuracy"] == sum(right) / len(right)
        assert report["tokens"] == len(losses)
    assert report["tuned"]["loss"] < report["base"]["loss"]  # the answers are those it was trained on


def test_token_scores_of_known_probabilities() -> None:
    """Two tokens in odds of 1 to 3: p = 1/4 and 3/4. The first label has nothing before it; -100 does not count."""
    odds = torch.tensor([0.0, math.log(3)]).expand(2, 4, 2)
    labels = torch.tensor([[1, 0, 1, 1], [0, -100, -100, 0]])
    loss, right, tokens = token_scores(odds, labels).unbind(1)
    torch.testing.assert_close(loss, torch.tensor([math.log(4) + 2 * math.log(4 / 3), math.log(4)]).double())
    assert right.tolist() == [2, 0] and tokens.tolist() == [3, 1]


def test_held_out_examples_are_a_fixed_choice() -> None:
    rows = Dataset.from_dict({"text": [str(index) for index in range(50)]})
    chosen = held_out(rows, 10)["text"]
    assert len(chosen) == 10 and chosen == held_out(rows, 10)["text"] and chosen != rows["text"][:10]
    assert held_out(rows, 50)["text"] == rows["text"]
    assert held_out(rows.to_iterable_dataset(), 3)["text"] == ["0", "1", "2"]


def test_card_and_report_of_a_run(text_run: dict[str, Any], llama_text: Path, prompts_file: Path) -> None:
    folder = Path(text_run["output"])
    card, config = (folder / "README.md").read_text(), DowserConfig.from_pretrained(folder)
    assert json.loads((folder / "retention.json").read_text()) == text_run["retention"]
    assert f"fine-tuned version of `{llama_text}`" in card and "None" not in card
    assert f'base = LlamaForCausalLM.from_pretrained("{llama_text}")' in card and "base_model," not in card
    assert "import dowser_peft\nfrom transformers import pipeline" in card and "pip install dowser-peft" not in card
    assert "import dowser_peft" in card and "\n- dowser\n" in card and card.count("## The Dowser adapter") == 1
    facts = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in card.splitlines() if line[:2] == "| "}
    assert facts["base model"] == f"`{llama_text}`"
    assert facts["fingerprint of its adapted weights"] == f"`{config.base_fingerprint}`"
    assert facts["rho"].startswith("0.1 ") and facts["seed"] == "0"
    assert facts["trained weights"] == f"{text_run['trained']:,}"
    assert facts["prompts"] == "N = 4 of 8 tokens" and facts["probes"] == "R = 2 per prompt, estimator `rms`"
    assert facts["loss"] == f"{text_run['retention']['base']['loss']:.4f}"
    assert f"Retention on `{prompts_file}`, split `train`: 4 examples" in card
    saved = (folder / "checkpoint-3" / "README.md").read_text()
    assert "N = 4 of 8 tokens" in saved and "Retention on" not in saved


def test_evaluation_during_training(llama_text: Path, text_file: Path, dowser, tmp_path: Path) -> None:
    flags = as_flags(FLAGS, model_name_or_path=llama_text, dataset_name=text_file, output_dir=tmp_path / "out")
    flags += [
        "--dataset_train_split",
        "train[:75%]",
        "--dataset_test_split",
        "train[75%:]",
        "--eval_strategy",
        "steps",
    ]
    result = dowser("train", *flags, "--eval_steps", 3, "--max_steps", 3)
    assert result.exit_code == 0, result.output
    assert "'eval_loss'" in result.stderr and "'eval_loss'" not in result.stdout
    assert f"Trained {llama_text}" in result.stdout and "3, 3 epochs" in result.stdout
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert any("eval_loss" in entry for entry in state["log_history"])
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")


def test_two_processes_train_what_one_does(llama_text: Path, text_file: Path, prompts_file: Path, tmp_path) -> None:
    """Each takes half of every batch, and of the retention data; only the first prints."""
    flags = as_flags(FLAGS, model_name_or_path=llama_text, dataset_name=text_file, retention_dataset=prompts_file)
    flags += [
        "--max_steps",
        3,
        "--save_strategy",
        "no",
        "--bf16",
        "false",
        "--per_device_eval_batch_size",
        1,
        "--json",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "dowser_peft", "train"]
    further = ["--output_dir", tmp_path / "two", "--per_device_train_batch_size", 2]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [str(part) for part in [*command, *flags, *further]],
        capture_output=True,
        text=True,
        timeout=400,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "find_unused_parameters" not in done.stderr  # nothing is looked for in vain
    two = json.loads(done.stdout)
    one = run_in_process("train", *flags, "--output_dir", tmp_path / "one", "--per_device_train_batch_size", 4)
    for name in ("base", "tuned"):
        assert two["retention"][name]["loss"] == pytest.approx(one["retention"][name]["loss"], rel=1e-6)
    assert two["retention"]["examples"] == 4 and two["retention"]["tokens"] == one["retention"]["tokens"]
    expected, found = adapter_tensors(tmp_path / "one"), adapter_tensors(tmp_path / "two")
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-6)
