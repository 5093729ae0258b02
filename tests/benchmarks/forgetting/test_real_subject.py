"""Models with their processors: what is learned, what is asked, what is answered."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from benchmarks.forgetting.methods import full
from benchmarks.forgetting.real.examples import Example
from benchmarks.forgetting.real.subject import Subject, load, squared
from benchmarks.forgetting.real.vila import Vila
from dowser_peft.cli.models import Source
from dowser_peft.miniature.training import Recipe, train
from tests.benchmarks.forgetting.real_fixtures import COLOURS, picture, save_llava, save_vila

CPU = torch.device("cpu")
SHORT = Example(picture(COLOURS["Ant"]), "What?", ["Ant", "Emmet"])
LONG = Example(picture(COLOURS["Bee"]), "What is this?", ["Bee"])


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return load(Source(str(save_llava(tmp_path_factory.mktemp("llava")))), "float32", CPU)


@pytest.fixture(scope="module")
def vila(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:  # code of checkpoints is copied there
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        folder = save_vila(tmp_path_factory.mktemp("vila"))
        yield load(Source(str(folder), trust_remote_code=True), "float32", CPU)


def _text(subject, ids):
    return subject.tokenizer.decode(ids).replace("<pad>", "")


def test_questions_are_padded_on_the_left(llava):
    batch = llava.questions([SHORT, LONG])
    assert batch["attention_mask"].sum(1).tolist() == [batch["input_ids"].shape[1] - 8, batch["input_ids"].shape[1]]
    assert batch["attention_mask"][:, -1].all()
    assert _text(llava, batch["input_ids"][0]) == "<s>USER: <image><image><image><image>\nWhat? ASSISTANT:"


def test_lessons_are_labelled_with_answer_and_eos(llava):
    batch = llava.lessons([SHORT, LONG])
    asked = llava.questions([SHORT, LONG])
    for row, answer in enumerate(["Ant</s>", "Bee</s>"]):
        real = batch["attention_mask"][row].bool()
        question = asked["input_ids"][row][asked["attention_mask"][row].bool()]
        assert real.tolist() == sorted(real.tolist(), reverse=True)  # padding is on the right
        assert torch.equal(batch["input_ids"][row][: len(question)], question)
        labelled = batch["labels"][row] >= 0
        assert torch.equal(batch["labels"][row][labelled], batch["input_ids"][row][labelled])
        assert _text(llava, batch["labels"][row][labelled]) == answer
        assert torch.equal(labelled, real & (torch.arange(len(real)) >= len(question)))
    assert torch.equal(batch["pixel_values"], asked["pixel_values"])


def test_padding_changes_no_loss(llava):
    """The loss of a batch is that of its rows, weighed by their answers' tokens."""
    alone = [llava.model(**llava.lessons([example])).loss for example in (SHORT, LONG)]
    together = llava.model(**llava.lessons([SHORT, LONG])).loss
    torch.testing.assert_close(together, (4 * alone[0] + 4 * alone[1]) / 8)


def test_padding_changes_no_answer(llava):
    together = llava.answers(llava.model, llava.questions([SHORT, LONG]), 5)
    assert together == [llava.answers(llava.model, llava.questions([example]), 5)[0] for example in (SHORT, LONG)]


def test_images_become_squares_instead_of_being_cropped():
    wide = squared(Image.new("RGB", (12, 4), (255, 0, 0)), (1, 2, 3))
    assert wide.size == (12, 12)
    assert [wide.getpixel((6, row)) for row in (3, 4, 7, 8)] == [(1, 2, 3), (255, 0, 0), (255, 0, 0), (1, 2, 3)]


def test_the_decoder_recomputes_activations(llava):
    assert llava.model.model.language_model.is_gradient_checkpointing
    assert not llava.model.model.vision_tower.is_gradient_checkpointing


def test_bfloat16_is_loaded_as_such(tmp_path):
    subject = load(Source(str(save_llava(tmp_path))), "bfloat16", CPU)
    assert subject.model.dtype == torch.bfloat16
    assert subject.questions([SHORT])["pixel_values"].dtype == torch.bfloat16


def test_a_processor_without_chat_template_is_refused(llava):
    processor = type("Processor", (), {"tokenizer": llava.tokenizer, "chat_template": None})()
    with pytest.raises(ValueError, match="has no chat template"):
        Subject(llava.model, processor)


# --- NVILA


def test_nvila_is_recognised(vila, llava):
    assert type(vila) is Vila and type(llava) is Subject
    assert vila.model.llm.model.is_gradient_checkpointing


def test_nvila_lessons(vila):
    wide = Example(picture(COLOURS["Bee"], (20, 4)), "What is this?", ["Bee"])  # two tiles
    batch = vila.lessons([SHORT, wide])
    assert len(batch["media"]["image"]) == 3 and batch["packing"] is False
    for row, answer in enumerate(["Ant</s>", "Bee</s>"]):
        labelled = batch["labels"][row] >= 0
        assert _text(vila, batch["labels"][row][labelled]) == answer
        assert _text(vila, batch["input_ids"][row][batch["attention_mask"][row]]).endswith(f"ASSISTANT:{answer}")
    alone = [vila.model(**vila.lessons([example])).loss for example in (SHORT, wide)]
    torch.testing.assert_close(vila.model(**batch).loss, (alone[0] + alone[1]) / 2)


def test_nvila_answers_do_not_depend_on_padding(vila):
    together = vila.answers(vila.model, vila.questions([SHORT, LONG]), 5)
    assert together == [vila.answers(vila.model, vila.questions([example]), 5)[0] for example in (SHORT, LONG)]


def test_nvila_learns_what_is_in_the_image(vila):
    """So that images, labels and answers belong together."""
    before = {name: value.clone() for name, value in vila.model.state_dict().items()}
    full.train_targets(vila.model, None)
    same = Example(LONG.image, SHORT.question, ["Bee"])
    lessons = (vila.lessons([SHORT, same]) for _ in range(20))
    train(vila.model, lessons, steps=20, lr=2e-2, recipe=Recipe("cosine", 0.03))
    assert vila.answers(vila.model, vila.questions([same, SHORT]), 8) == ["Bee", "Ant"]
    vila.model.load_state_dict(before)
