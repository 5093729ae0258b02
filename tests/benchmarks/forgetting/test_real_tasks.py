"""Every data set in the format of the hub: what is asked, what counts as right, what is said if it is not there."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from benchmarks.forgetting.real import readers, tasks
from benchmarks.forgetting.real.examples import micro_batches
from benchmarks.forgetting.real.sources import DataError
from tests.benchmarks.forgetting.real_fixtures import COLOURS, gqa, image_net_r, picture, write

RED, BLUE = COLOURS["Ant"], COLOURS["Bee"]


def _colour(example):
    return example.image.getpixel((0, 0))


def test_text_vqa(tmp_path):
    columns = {
        "image": [picture(RED)],
        "question": ["what brand is it?"],
        "answers": [["coke"] * 10],
        "ocr_tokens": [["Coca", "Cola"]],
    }
    (example,) = tasks.examples("textvqa", "test", write(tmp_path, columns, "validation"))
    assert example.question == (
        "what brand is it?\nReference OCR token: Coca, Cola\nAnswer the question using a single word or phrase."
    )
    assert example.references == ["coke"] * 10
    assert _colour(example) == RED


def test_ok_vqa(tmp_path):
    columns = {"image": [picture()], "question": ["Why?"], "answers": [["rain", "snow"]]}
    (example,) = tasks.examples("okvqa", "test", write(tmp_path, columns, "val2014"))
    assert example.question == "Why?\nAnswer the question using a single word or phrase."
    assert example.references == ["rain", "snow"]


@pytest.mark.parametrize(
    ("name", "config", "suffix"),
    [
        ("mmbench-en", "en", "Answer with the option's letter from the given choices directly."),
        ("mmbench-cn", "cn", "请直接回答选项字母。"),
    ],
)
def test_mm_bench(tmp_path, name, config, suffix):
    columns = {
        "index": [1, 2],
        "image": [picture(RED), picture(BLUE)],
        "question": ["Which?", "What?"],
        "hint": ["nan", "Look."],
        "answer": ["B", "A"],
        "A": ["ant", "yes"],
        "B": ["bee", "no"],
        "C": ["cat", "nan"],
        "D": [None, None],
    }
    write(tmp_path, columns | {"question": ["wrong configuration"] * 2}, "dev", "other")
    first, second = tasks.examples(name, "test", write(tmp_path, columns, "dev", config))
    assert first.question == f"Which?\nA. ant\nB. bee\nC. cat\n{suffix}"
    assert second.question == f"Look.\nWhat?\nA. yes\nB. no\n{suffix}"
    assert [first.references, second.references] == [["B"], ["A"]]


def test_gqa_joins_its_images(tmp_path):
    found = list(tasks.examples("gqa", "test", gqa(tmp_path)))
    assert [_colour(example) for example in found] == [BLUE, RED, BLUE]
    assert [example.references for example in found] == [["no"], ["bee"], ["yes"]]
    assert found[1].question == "What is it?\nAnswer the question using a single word or phrase."


def test_ocr_vqa_asks_several_questions_about_an_image(tmp_path):
    columns = {
        "image": [picture(RED), picture(BLUE)],
        "questions": [["Who wrote it?", "What year?"], ["Title?"]],
        "answers": [["Ann", "1999"], ["Bees"]],
    }
    found = list(tasks.examples("ocrvqa", "test", write(tmp_path, columns, "test")))
    assert [(_colour(example), example.references) for example in found] == [
        (RED, ["Ann"]),
        (RED, ["1999"]),
        (BLUE, ["Bees"]),
    ]
    assert found[2].question.startswith("Title?\nAnswer")


def _icon_qa(answers):
    return {
        "query_image": [picture(RED), picture(), picture(BLUE)],
        "question": ["Odd?", "Which?", "How many?"],
        "choices": ["yes, no", "", "2,3,4"],
        "answer": answers,
        "ques_type": ["choose_txt", "choose_img", "choose_txt"],
    }


@pytest.mark.parametrize("answers", [["no", "", "2"], ["1", "0", "0"]], ids=["text", "position"])
def test_icon_qa_with_options_in_words(tmp_path, answers):
    first, second = tasks.examples("iconqa", "test", write(tmp_path, _icon_qa(answers), "test"))
    assert first.question == f"Odd?\nA. yes\nB. no{readers.LETTER}"
    assert (first.references, second.references) == (["B"], ["A"])
    assert _colour(second) == BLUE


def test_icon_qa_whose_answers_are_neither(tmp_path):
    with pytest.raises(DataError, match="iconqa: answers are neither among their choices nor positions"):
        tasks.examples("iconqa", "test", write(tmp_path, _icon_qa(["maybe", "", "2"]), "test"))


def test_image_net_r_is_cut_in_two(tmp_path, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "imagenet-r", _with("imagenet-r", held_out=10))
    folder = image_net_r(tmp_path, 24)
    parts = {split: tasks.examples("imagenet-r", split, folder) for split in ("train", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 14, "test": 10}
    for part in parts.values():
        assert all(_colour(example) == COLOURS[example.references[0]] for example in part)
    assert parts["test"].items == tasks.examples("imagenet-r", "test", folder).items


def _with(name, **changes):
    return dataclasses.replace(tasks.TASKS[name], **changes)


def test_captions_one_a_row(tmp_path):
    """``jxie/coco_captions``: learned one by one, tested by image."""
    columns = {
        "image": [picture(RED), picture(RED), picture(BLUE)],
        "cocoid": [7, 7, 9],
        "caption": ["an ant", "a red ant", "a bee"],
    }
    write(tmp_path, columns, "train")
    write(tmp_path, columns, "test")
    lessons = list(tasks.examples("coco-caption", "train", tmp_path))
    assert [example.references for example in lessons] == [["an ant"], ["a red ant"], ["a bee"]]
    test = list(tasks.examples("coco-caption", "test", tmp_path))
    assert [(example.references, _colour(example)) for example in test] == [
        (["an ant", "a red ant"], RED),
        (["a bee"], BLUE),
    ]
    assert all(example.question in readers.CAPTIONS for example in lessons + test)


def test_captions_of_an_image_in_a_row(tmp_path):
    """``flickr30k``, here with the column that tells its splits; one of the captions is learned."""
    captions = [[f"caption {row} {number}" for number in range(5)] for row in range(3)]
    columns = {"image": [picture()] * 3, "caption": captions, "split": ["train", "test", "val"]}
    folder = write(tmp_path, columns, "test")
    (lesson,) = tasks.examples("flickr30k", "train", folder)
    assert len(lesson.references) == 1 and lesson.references[0] in captions[0]
    (question,) = tasks.examples("flickr30k", "test", folder)
    assert question.references == captions[1]


def test_annotations_in_the_layout_of_llava(tmp_path):
    """As the authors of Model-Dowser publish them: prompts and answers are theirs."""
    (tmp_path / "images" / "part").mkdir(parents=True)
    picture(RED).save(tmp_path / "images" / "part" / "a.png")
    talk = [{"from": "human", "value": "<image>\nOdd?\nA. yes\nB. no"}, {"from": "gpt", "value": "Answer: B"}]
    (tmp_path / "train.json").write_text(json.dumps([{"id": "1", "image": "part/a.png", "conversations": talk}]))
    test = {"id": 2, "image": "part/a.png", "text": "Even?", "reference": "Answer: A"}
    (tmp_path / "test.jsonl").write_text(json.dumps(test) + "\n")
    (lesson,) = tasks.examples("iconqa", "train", tmp_path)
    assert (lesson.question, lesson.references, _colour(lesson)) == ("Odd?\nA. yes\nB. no", ["Answer: B"], RED)
    (question,) = tasks.examples("iconqa", "test", tmp_path)
    assert (question.question, question.references) == ("Even?", ["Answer: A"])


def test_annotations_with_several_references(tmp_path):
    picture().save(tmp_path / "a.png")
    (tmp_path / "test.json").write_text(json.dumps([{"image": "a.png", "text": "Describe.", "reference": ["x", "y"]}]))
    (question,) = tasks.examples("coco-caption", "test", tmp_path)
    assert question.references == ["x", "y"]
    with pytest.raises(DataError, match="put train.json beside them"):
        tasks.examples("coco-caption", "train", tmp_path)


def test_an_image_that_is_not_there_is_missed_at_once(tmp_path):
    (tmp_path / "test.json").write_text(json.dumps([{"image": "a.png", "text": "Describe.", "answer": "x"}]))
    with pytest.raises(DataError, match=r"no image .*a\.png.*beside the annotations"):
        tasks.examples("coco-caption", "test", tmp_path)


# --- what is not there


def test_a_data_set_that_cannot_be_loaded_says_how_to_get_it():
    with pytest.raises(DataError) as caught:  # the hub is out of reach in tests
        tasks.examples("okvqa", "test")
    for part in ("okvqa", "huggingface.co/datasets/lmms-lab/OK-VQA", "hf auth login", "--data okvqa=FOLDER"):
        assert part in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="okvqa: there is no folder .*check --data okvqa=FOLDER"):
        tasks.examples("okvqa", "test", tmp_path / "nothing")


def test_a_folder_without_the_split(tmp_path):
    folder = write(tmp_path, {"image": [picture()], "question": [""], "answers": [[""]]}, "train")
    with pytest.raises(
        DataError, match="no.* files of the split 'val2014'.*hf download --repo-type dataset lmms-lab/OK"
    ):
        tasks.examples("okvqa", "test", folder)


def test_other_columns_are_named(tmp_path):
    folder = write(tmp_path, {"image": [picture()], "question": [""], "answer": [""]}, "val2014")
    with pytest.raises(DataError, match="has no column 'answers', but image, question, answer"):
        tasks.examples("okvqa", "test", folder)


def test_two_folders_of_one_name_are_two(tmp_path):
    """``datasets`` tells folders with a README apart by their names."""
    for number in (1, 2):
        folder = tmp_path / str(number) / "okvqa"
        columns = {"image": [picture()], "question": [f"{number}?"], "answers": [["x"]]}
        write(folder, columns, "val2014")
        readme = (
            "---\nconfigs:\n- config_name: data\n  data_files:\n  - split: val2014\n    path: data/*.parquet\n---\n"
        )
        (folder / "README.md").write_text(readme)
        (example,) = tasks.examples("okvqa", "test", folder)
        assert example.question.startswith(f"{number}?")


# --- which examples, in which order


def test_a_subset_is_always_the_same(tmp_path):
    examples = tasks.examples("imagenet-r", "test", image_net_r(tmp_path, 24))
    part = examples.subset(5)
    assert len(part) == 5 and part.items == examples.subset(5).items
    assert all(item in examples.items for item in part.items)
    assert examples.subset(None) is examples is examples.subset(100)


def test_every_epoch_has_every_example_once():
    order = [index for batch in micro_batches(6, 6, 2, seed=0) for index in batch]
    assert sorted(order[:6]) == sorted(order[6:]) == list(range(6))
    assert order[:6] != order[6:]
    assert order == [index for batch in micro_batches(6, 6, 2, seed=0) for index in batch]
    assert order != [index for batch in micro_batches(6, 6, 2, seed=1) for index in batch]


def test_a_global_batch_is_the_same_however_it_is_cut():
    def steps(size, processes, accumulation):
        shares = [
            list(micro_batches(10, 3 * accumulation, size, 0, process=process, processes=processes))
            for process in range(processes)
        ]
        rows = np.array(shares).swapaxes(0, 1).reshape(3, -1)
        return [sorted(row) for row in rows.tolist()]

    assert steps(8, 1, 1) == steps(2, 2, 2) == steps(1, 4, 2) == steps(4, 1, 2)
