"""Tiny models, tokenizers and adapters in folders, as a user has them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from dowser_peft import DowserConfig
from dowser_peft.cli import app
from tests import models


@pytest.fixture
def dowser() -> Callable[..., Any]:
    """Runs ``dowser-peft`` with the given arguments."""
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def dowser_json(dowser: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Runs ``dowser-peft ... --json`` and parses all of stdout."""

    def run(*arguments: Any) -> dict[str, Any]:
        result = dowser(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return run


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _saved(models.tiny_llama().bfloat16(), tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = _saved(models.tiny_llava(), tmp_path_factory.mktemp("base") / "llava")
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    return folder


@pytest.fixture(scope="session")
def llama_adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_adapter(llama, tmp_path_factory.mktemp("adapter") / "llama")


@pytest.fixture(scope="session")
def llava_adapter(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_adapter(llava, tmp_path_factory.mktemp("adapter") / "llava")


def trained_adapter(base: Path, folder: Path, model: nn.Module | None = None, **options: Any) -> Path:
    """An adapter of the model in ``base``, with values as if it had been trained."""
    from dowser_peft.cli.models import Source, load_model

    model = load_model(Source(str(base))) if model is None else model
    adapted = get_peft_model(model, DowserConfig(importance="magnitude", **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    adapted.save_pretrained(str(folder))
    return folder


def _saved(model: Any, folder: Path) -> Path:
    words = {f"w{index}": index for index in range(models.VOCABULARY)}
    backend = Tokenizer(WordLevel(words, unk_token="w3"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", bos_token="w1", eos_token="w2")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is read from files is cached here, and not in the user's home."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="session")
def llama_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and the tokenizer of test_trl.py, with a token for each special one."""
    from tests.test_trl import tokenizer

    folder = tmp_path_factory.mktemp("base") / "llama"
    models.tiny_llama().bfloat16().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llava_processor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision-language model with a processor and a chat template."""
    from tests.test_trl import processor

    folder = tmp_path_factory.mktemp("base") / "llava"
    models.tiny_llava().save_pretrained(folder)
    made = processor()
    parts = (
        "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}"
    )
    made.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        f"{{% generation %}}{parts}{{% endgeneration %}}{{% else %}}{parts}{{% endif %}}{{% endfor %}}"
    )
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.cli.train_helpers import ANSWERS, PROMPTS, write_rows

    rows = [{"text": prompt + answer} for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    return write_rows(tmp_path_factory.mktemp("data") / "text.jsonl", rows)


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.cli.train_helpers import ANSWERS, PROMPTS, write_rows

    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    return write_rows(tmp_path_factory.mktemp("data") / "prompts.jsonl", rows)
