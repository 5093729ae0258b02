"""Metrics of the real benchmark against scores worked out by hand."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.forgetting.real import metrics


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Dog.", "dog"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("yes!", "yes"),
        ("black/white", "black white"),
        ("t-shirt", "t shirt"),
        ("black - white", "black white"),
        ("man's hat", "man 's hat"),
        ("an\napple", "apple"),
    ],
)
def test_normalised_answers(answer, expected):
    assert metrics.normalised(answer) == expected


def test_vqa_accuracy_by_hand():
    """Four of ten say "red": leaving out one of those three are left, which is enough; two say "maroon": leaving out
    one of them 1/3, one of the other eight 2/3, on average 0.6; nobody says "blue"."""
    answers = ["red"] * 4 + ["maroon"] * 2 + ["dark"] * 4
    assert metrics.vqa_accuracy(["Red."], [answers]) == pytest.approx(100)
    assert metrics.vqa_accuracy(["maroon"], [answers]) == pytest.approx(100 * (2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert metrics.vqa_accuracy(["blue", "a red"], [answers, answers]) == pytest.approx(50)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b.", "B"),
        ("(C)", "C"),
        ("Answer: D", "D"),
        ("The answer is A.", "A"),
        ("B. a dog", "B"),
        ("(B) a dog", "B"),
        ("B\n", "B"),
        ("A dog on the mat.", None),
        ("I think it is B", None),
        ("The answer is a dog.", None),
        ("Bananas", None),
        ("", None),
        ("7", None),
    ],
)
def test_the_letter_of_an_answer(text, letter):
    assert metrics.option(text) == letter


def test_option_accuracy():
    assert metrics.option_accuracy(["B", "Answer: C", "dunno"], [["B"], ["Answer: C"], ["A"]]) == pytest.approx(
        200 / 3
    )


def test_exact_match_forgives_case_and_full_stop():
    found = metrics.exact_match(["Bee.", " ant", "bees"], [["bee"], ["Ant", "emmet"], ["bee"]])
    assert found == pytest.approx(200 / 3)


def test_cider_rewards_what_is_particular():
    references = [["a red dog runs on grass", "a dog runs"], ["a blue car stands still", "a car in the street"]]
    exact = metrics.cider(["a red dog runs on grass", "a blue car stands still"], references)
    swapped = metrics.cider(["a blue car stands still", "a red dog runs on grass"], references)
    shouted = metrics.cider(["A RED DOG, runs on grass!", "A blue car stands still."], references)
    assert exact > 100 > swapped == pytest.approx(0, abs=1)
    assert shouted == pytest.approx(exact)


def test_cider_of_one_word_by_hand(monkeypatch):
    """Two images with one reference of one word each, told right: only 1-grams, each of similarity 1, so that CIDEr
    is 10 times the mean over the four lengths of n-grams, 10 / 4."""
    monkeypatch.setattr(metrics, "caption_tokenizer", lambda: "nltk")
    assert metrics.cider(["dog", "car"], [["dog"], ["car"]]) == pytest.approx(250)


CAPTIONS = [
    "A man's dog isn't running on a t-shirt.",
    'Two men (one in red) can\'t play "frisbee" in the U.S.A.!',
    "A well-lit street... with 2,000 people - and cars, at night;",
    "the mother-in-law's cat &amp; the girls' dog -- brown",
    "He'll gonna  fly a $5 kite.\n",
]


@pytest.mark.skipif(shutil.which("java") is None, reason="the Stanford tokenizer needs Java")
def test_both_tokenizers_agree():
    assert metrics.nltk_words({7: CAPTIONS}) == metrics.stanford_words({7: CAPTIONS})


def test_words_without_java():
    (words,) = metrics.nltk_words({0: [CAPTIONS[0]]})[0]
    assert words == "a man 's dog is n't running on a t-shirt"


def test_which_tokenizer_is_used(monkeypatch):
    metrics.caption_tokenizer.cache_clear()
    monkeypatch.setattr(metrics.shutil, "which", lambda name: None)
    assert metrics.caption_tokenizer() == "nltk"
    metrics.caption_tokenizer.cache_clear()
