"""Reads questions from shards: each answer of a conversation is a question, with the true turns before it as context.

For a document without a question, such as a caption, the last supervised text is the answer and the rest the prompt.
"""

from collections.abc import Iterator
from typing import Any

from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shards.cache import ShardCache
from fuyu_e2e.data.shards.formats import Sample, description, document
from fuyu_e2e.data.shards.locations import expand_patterns
from fuyu_e2e.data.shards.reading import Shard
from fuyu_e2e.errors import UnusableSampleError
from fuyu_e2e.eval.question import Question


def read_shards(shards: str, stats: SampleStats, whole: bool = False) -> Iterator[Question]:
    """Yields the questions of shards, in stored order: one a turn of a conversation, one a sample otherwise.

    In addition to its format, the JSON of a sample may have `"groups": {"kind": "relational"}`, `"choices": [...]` and
    `"image": "name"`: samples with the same image name are about one image.

    Args:
        shards: A path, glob, brace pattern or URL.
        stats: Counts all samples as read, and by reason those that aren't questions, such as `no-answer`, and
            `json-type` if one of the three keys has the wrong type.
        whole: Whether to ask only for the last turn, whose prompt and answer are the whole document.

    Raises:
        UserError: There are no shards, or one can't be read.
    """
    cache = ShardCache.at()
    for name in expand_patterns(shards):
        shard = Shard(cache.path(name), name)
        for number in range(len(shard)):
            stats.read += 1
            try:
                found = questions(shard.sample(number))
            except UnusableSampleError as error:
                stats.skip(error)
                continue
            yield from found[-1:] if whole else found


def questions(sample: Sample) -> list[Question]:
    """Returns the questions of a sample, its last turn last.

    Choices belong to one question: in a sample with choices, an earlier turn is a question only if its answer is one
    of them.

    Raises:
        UnusableSampleError: As in `read_shards`, and in `fuyu_e2e.data.shards.formats.document`.
    """
    asked = document(sample)
    where = f"{sample.shard}: {sample.key}"
    if not asked.answer:
        raise UnusableSampleError("no-answer", where)
    described = description(sample)
    groups, choices, image = (described.get(name, default) for name, default in DEFAULTS.items())
    if not isinstance(groups, dict) or not isinstance(choices, list) or not isinstance(image, str):
        raise UnusableSampleError("json-type", f"{where}: groups, choices or image is not what it should be")
    if not all(isinstance(text, str) for text in (*groups.values(), *choices)):
        raise UnusableSampleError("json-type", f"{where}: a group or a choice is no text")
    turns = asked.turns
    return [
        Question(
            document=turn.prompt,
            references=(turn.answer,),
            choices=tuple(choices),
            image=image or sample.key,
            groups=groups,
            turn=number,
        )
        for number, turn in enumerate(turns, 1)
        if not choices or number == len(turns) or turn.answer in choices
    ]


DEFAULTS: dict[str, Any] = {"groups": {}, "choices": [], "image": ""}
"""Optional JSON keys of a sample about its question, with their defaults."""
