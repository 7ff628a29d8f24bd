"""The accuracy of VQA and VQAv2: an answer counts in full if three other annotators gave it.

Antol et al. 2015, "VQA: Visual Question Answering", section 3, and Goyal et al. 2017, "Making the V in VQA Matter",
computed as in the official script for v2.0, including its peculiarities.
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
DIGITS_WITH_COMMA = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
"""Every period except one before a digit."""
ARTICLES = frozenset({"a", "an", "the"})
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(DIGITS)}
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
"""Contractions whose missing apostrophe the official script restores; words such as "shed" and "well" stay."""
CONTRACTIONS = {
    word[: mark.start()] + word[mark.end() :]: word for word in CONTRACTED.split() for mark in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}  # the wrong way round in the official script


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Returns the mean over annotators of min(how many of the others gave this answer / 3, 1).

    With ten annotators, three that agree with the answer give 0.9 and four give 1. With one annotator there are no
    others, and the accuracy is always 0; with two it is at most 1/3. Use `accuracy` for such data.

    Answers are compared after `normalise`, unless all annotators wrote exactly the same: then, as in the official
    script, the answer must equal that except for surrounding white space.
    """
    answer, *given = (text.replace("\n", " ").replace("\t", " ").strip() for text in (answer, *references))
    if len(set(given)) > 1:
        answer, *given = (normalise(text) for text in (answer, *given))
    agreeing = Counter(given)[answer]
    others = [agreeing - (reference == answer) for reference in given]
    return sum(min(count / 3, 1.0) for count in others) / len(given)


@lru_cache(maxsize=2**16)  # annotators mostly write the same few words
def normalise(answer: str) -> str:
    """Returns an answer without punctuation and articles, with numbers up to ten in digits and apostrophes restored.

    A punctuation mark is removed if it is next to a space somewhere in the answer, or if the answer has a comma
    between digits; otherwise it becomes a space.
    """
    text = answer
    remove_all = DIGITS_WITH_COMMA.search(answer) is not None
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if remove_all or beside_space else " ")
    words = (NUMBERS.get(word, word) for word in PERIOD.sub("", text).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
