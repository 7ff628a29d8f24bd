"""Words and n-grams of captions, as BLEU, CIDEr-D and ROUGE-L count them."""

import re
from collections import Counter

TOKEN = re.compile(
    r"""
      \d+(?:[.,:/]\d+)+                 # 1,000  3.5  10:30  1/2
    | \w+?(?=n't\b) | n't\b             # does n't
    | '(?:s|m|d|ll|re|ve)\b             # dog 's
    | \w+(?:[-'/]\w+)*?(?='(?:s|m|d|ll|re|ve)\b) | \w+(?:[-'/]\w+)*   # black-and-white
    | [^\w\s.,:;?!'"`\-()\[\]{}…–—‘’“”]    # signs, each one a word: & $ %
    """,
    re.VERBOSE,
)
LONGEST = 4
"""Words of the longest n-gram that counts."""


def words(caption: str) -> list[str]:
    """Returns the words of a caption in lower case, without punctuation.

    Close to the COCO evaluation, which uses Stanford's PTBTokenizer and needs Java: `n't`, `'s` and the like are
    separate words, hyphenated words are one, punctuation is dropped. It differs in that abbreviations lose their
    periods ("u.s." is `u`, `s`), brackets are dropped (there they stay, as `-lrb-`), "cannot" and "gonna" are one
    word (there they are two), and the `'n'` of "rock 'n' roll" is `n`.
    """
    return TOKEN.findall(caption.lower().replace("’", "'"))


def ngrams(tokens: list[str]) -> Counter[tuple[str, ...]]:
    """Returns how often each n-gram of one to four words occurs."""
    return Counter(
        tuple(tokens[start : start + n]) for n in range(1, LONGEST + 1) for start in range(len(tokens) - n + 1)
    )
