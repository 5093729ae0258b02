"""A tiny LLaVA with its processor as a checkpoint, and data sets with a few rows in the format of the hub."""

from __future__ import annotations

import shutil
import string
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Image
from PIL import Image as Pictures
from tokenizers import Tokenizer, decoders, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import CLIPImageProcessorPil, GenerationConfig, LlavaProcessor, PreTrainedTokenizerFast

from tests.benchmarks.forgetting.tiny_vila import TinyVila, TinyVilaConfig
from tests.models import tiny_llava, tiny_nvila

TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# A token a character; ids 0 to 5 are those of tests.models.
CHARACTERS = string.ascii_lowercase + string.ascii_uppercase + string.digits + " \n.,:'?-()"
COLOURS = {"Ant": (230, 20, 20), "Bee": (20, 20, 230)}


def tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "</s>", "<unk>", "<free>", "<image>"]
    ids = {token: index for index, token in enumerate([*special, *CHARACTERS])}
    backend = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    backend.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **names,
        additional_special_tokens=["<image>"],
        clean_up_tokenization_spaces=False,
    )


def image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})


def save_llava(folder: Path) -> Path:
    """A randomly initialised LLaVA that ``from_pretrained`` loads, processor included."""
    model = tiny_llava()
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor(),
        tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" leaves out again
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


def picture(colour: tuple[int, int, int] = (90, 120, 60), size: tuple[int, int] = (12, 8)) -> Pictures.Image:
    return Pictures.new("RGB", size, colour)


def write(folder: Path, columns: dict[str, list], split: str, config: str = "data") -> Path:
    """Rows as the parquet file of a split, in a folder for the configuration, as on the hub."""
    rows = Dataset.from_dict(columns)
    for name, values in columns.items():
        if any(isinstance(value, Pictures.Image) for value in values):
            rows = rows.cast_column(name, Image())
    path = folder / config / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(path)
    return folder


def image_net_r(folder: Path, count: int = 24) -> Path:
    """``axiong/imagenet-r``: a single split."""
    rng = np.random.default_rng(0)
    names = [str(name) for name in rng.choice(list(COLOURS), count)]
    images = [picture(COLOURS[name]) for name in names]
    return write(folder, {"image": images, "wnid": ["n0"] * count, "class_name": [n.lower() for n in names]}, "test")


def gqa(folder: Path) -> Path:
    """``lmms-lab/GQA``: questions and images are two configurations."""
    write(
        folder,
        {
            "id": ["q0", "q1", "q2"],
            "imageId": ["b", "a", "b"],
            "question": ["Is it red?", "What is it?", "Is it blue?"],
            "answer": ["no", "bee", "yes"],
        },
        "testdev",
        "testdev_balanced_instructions",
    )
    images = [picture(COLOURS["Ant"]), picture(COLOURS["Bee"])]
    return write(folder, {"id": ["a", "b"], "image": images}, "testdev", "testdev_balanced_images")


def save_vila(folder: Path) -> Path:
    """A randomly initialised NVILA with code of its own, as on the hub: its tokenizer is in ``llm``."""
    source = Path(__file__).with_name("tiny_vila.py")
    tokenizer().save_pretrained(folder / "llm")
    code = {name: f"tiny_vila.TinyVila{end}" for name, end in _VILA_CLASSES.items()}
    config = TinyVilaConfig(
        llm={name: value for name, value in tiny_nvila().llm.config.to_dict().items() if value is not None},
        vision={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"image_size": 8, "patch_size": 4},
        auto_map=code,
        architectures=["TinyVila"],
    )
    config._name_or_path = str(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TinyVila(config)
    model.save_pretrained(folder)
    shutil.copy(source, folder / source.name)
    return folder


_VILA_CLASSES = {"AutoConfig": "Config", "AutoModel": "", "AutoProcessor": "Processor"}
