"""What a document asks, and what answers it."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fuyu_e2e.data.document import Document, Image, Text

ASK, SAY, SEE = Text("asked", loss=False), Text("said"), Image(b"image")


def test_each_answer_of_a_conversation_is_a_turn() -> None:
    talk = Document("k", (SEE, Text("a?", False), Text("a"), Text("b?", False), SEE, Text("b"), Text("c?", False)))
    first, second = talk.turns
    assert (list(first.prompt.texts), first.answer) == (["a?"], "a")
    assert (list(second.prompt.texts), second.answer) == (["a?", "a", "b?"], "b")
    assert second.prompt.segments[-1] == SEE


def test_what_asks_nothing_is_one_turn() -> None:
    caption = Document("k", (SEE, Text("a"), SEE, Text("b")))
    assert caption.turns == (caption,)
    assert Document("k", (SEE, ASK)).turns == (Document("k", (SEE, ASK)),)


@given(st.lists(st.sampled_from([ASK, SAY, SEE])))
def test_turns_grow_and_the_last_asks_for_what_the_document_asks_for(segments: list) -> None:
    document = Document("k", tuple(segments))
    turns = document.turns
    for turn in turns:
        assert turn.segments == document.segments[: len(turn.segments)]
    lengths = [len(turn.segments) for turn in turns]
    assert lengths == sorted(set(lengths))
    assert (turns[-1].prompt, turns[-1].answer) == (document.prompt, document.answer) or not document.answer
    speakers = [segment for segment in segments if segment is not SEE]
    answered = sum(pair == (ASK, SAY) for pair in pairwise(speakers))
    assert len(turns) == max(1, answered)
