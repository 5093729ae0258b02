"""Scores in percent, as the papers of the data sets define them.

VQA accuracy    an answer counts min(1, matches / 3) with the answers of all annotators but one, averaged over which
                one is left out; both sides are normalised (case, punctuation, articles, numerals, contractions)
option          the letter of the chosen option
exact match     case and a full stop at the end aside
CIDEr           of pycocoevalcap, times 100

CIDEr compares words as the Penn Treebank splits them. The Stanford tokenizer that pycocoevalcap brings along needs
Java; without Java the tokenizer of NLTK stands in for it, and the row says so (``caption_tokenizer``).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from html import unescape
from statistics import mean

Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], float]  # predictions, references of each -> percent

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMERALS = {
    **{
        word: str(number)
        for number, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven"])
    },
    **{"eight": "8", "nine": "9", "ten": "10", "none": "0"},
}
_ARTICLES = {"a", "an", "the"}
_CONTRACTIONS = re.findall(
    r"\S+",
    """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd've he's
    how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
    needn't not've o'clock oughtn't shan't she'd've she's should've shouldn't shouldn't've somebody'll somebody's
    someone'll someone's something'll something's that'd that'd've that's there'd there'd've there're there's they'd
    they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    you'd you'd've you'll you're you've
    """,
)
_OPTION = re.compile(
    r"""\s* (?: (?:the\s+)? (?:correct\s+)? (?:answer|option) (?:\s+is)? \s* [:.]? \s* )?
    \(? ([A-Za-z]) (?: \) | (?= \s* $ | [.,:] ) )""",
    re.VERBOSE | re.IGNORECASE,
)
# What the Treebank calls punctuation, which CIDEr leaves out.
_NO_WORDS = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_END_OF_WORD = re.compile(r"(?<![\w.])(\w+(?:['-]\w+)*)\.(?=\s|$)")  # not that of "p.m."


def _without_apostrophes(word: str) -> set[str]:
    """All spellings of a contraction in which at least one apostrophe is missing."""
    spellings = {""}
    for part in re.split(r"(')", word):
        spellings = {begun + rest for begun in spellings for rest in ({part, ""} if part == "'" else {part})}
    return spellings - {word}


_SPELLED_OUT = {spelling: word for word in _CONTRACTIONS for spelling in _without_apostrophes(word)}


def normalised(answer: str) -> str:
    """An answer as VQA accuracy compares it."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ")
    for mark in _PUNCTUATION:
        is_beside_space = f"{mark} " in text or f" {mark}" in text
        text = text.replace(mark, "" if is_beside_space else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [_NUMERALS.get(word, word) for word in text.split()]
    return " ".join(_SPELLED_OUT.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    return 100 * mean(map(_vqa_score, predictions, references))


def _vqa_score(prediction: str, answers: Sequence[str]) -> float:
    wanted = [normalised(answer) for answer in answers]
    matches = wanted.count(normalised(prediction))
    return mean(min(1.0, (matches - (answer == normalised(prediction))) / 3) for answer in wanted)


def option(text: str) -> str | None:
    """The letter that an answer chooses: "B", "b.", "(B)", "Answer: B"; None for anything else, "A dog", too."""
    match = _OPTION.match(text)
    return match[1].upper() if match else None


def option_accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    pairs = zip(predictions, references, strict=True)
    return 100 * mean(
        option(prediction) in {option(answer) for answer in answers} - {None} for prediction, answers in pairs
    )


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    def plain(text: str) -> str:
        return text.strip().rstrip(".").lower()

    pairs = zip(predictions, references, strict=True)
    return 100 * mean(plain(prediction) in map(plain, answers) for prediction, answers in pairs)


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    from pycocoevalcap.cider.cider import Cider

    tokenize = _TOKENIZERS[caption_tokenizer()]
    found, _ = Cider().compute_score(
        tokenize(dict(enumerate(references))), tokenize({number: [text] for number, text in enumerate(predictions)})
    )
    return 100 * float(found)


Captions = dict[int, Sequence[str]]


@cache
def caption_tokenizer() -> str:
    """Which tokenizer CIDEr uses on this machine: "stanford", or "nltk" without Java."""
    return "stanford" if shutil.which("java") else "nltk"


def stanford_words(captions: Captions) -> dict[int, list[str]]:
    """Captions in lower case, words apart, without punctuation."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    lines = {number: [{"caption": " ".join(text.split())} for text in texts] for number, texts in captions.items()}
    return PTBTokenizer().tokenize(lines)


def nltk_words(captions: Captions) -> dict[int, list[str]]:
    """What :func:`stanford_words` gives, nearly always, without Java."""
    from nltk.tokenize import TreebankWordTokenizer

    split = TreebankWordTokenizer().tokenize

    def words(text: str) -> str:
        apart = _END_OF_WORD.sub(r"\1 .", " ".join(unescape(text).lower().split()))
        return " ".join(word.lower() for word in split(apart, convert_parentheses=True) if word not in _NO_WORDS)

    return {number: [words(text) for text in texts] for number, texts in captions.items()}


_TOKENIZERS = {"stanford": stanford_words, "nltk": nltk_words}
METRICS: dict[str, Metric] = {
    "VQA accuracy": vqa_accuracy,
    "option": option_accuracy,
    "exact match": exact_match,
    "CIDEr": cider,
}
