"""Shards as questions: each answer of a conversation is asked for, with the true turns before it as context.

Of a document that asks nothing, a caption, the last supervised text is the answer, and what stands before it the
prompt.
"""

from collections.abc import Iterator
from typing import Any

from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shards.cache import ShardCache
from fuyu_e2e.data.shards.formats import description, document
from fuyu_e2e.data.shards.locations import expand_patterns
from fuyu_e2e.data.shards.reading import Sample, Shard
from fuyu_e2e.errors import UnusableSampleError
from fuyu_e2e.eval.question import Question


def read_shards(shards: str, stats: SampleStats, whole: bool = False) -> Iterator[Question]:
    """Yields the questions of shards, in stored order: of a conversation one a turn, of all else one a sample.

    Beside what its format has, the JSON of a sample may hold `"groups": {"kind": "relational"}`, `"choices": [...]`
    and `"image": "name"`: samples that share an image name are about one image.

    Args:
        shards: Path, glob, brace pattern or URL.
        whole: Whether to ask for the last turn only, whose prompt and answer are the whole document.
        stats: Counts all samples as read, and by reason those that are no question: among them `no-answer`, and
            `json-type` where one of the three is something else.

    Raises:
        UserError: There are none, or one can't be read.
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
    """Returns the questions that a sample asks, its last turn last.

    Choices are those of one question: of a sample that has some, a turn before the last is a question where its answer
    is one of them.

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
"""What a sample may say of its question, and what holds where it doesn't."""
