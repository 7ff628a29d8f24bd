"""Readers of public benchmarks, by the names that task files call them by.

Each takes the benchmark's files as they are published, a prompt and a stats that counts what is read.
"""

from collections.abc import Callable, Iterator, Mapping

from fuyu_e2e.eval.formats.coco_captions import read_coco_captions
from fuyu_e2e.eval.formats.docvqa import read_docvqa
from fuyu_e2e.eval.formats.textvqa import read_textvqa
from fuyu_e2e.eval.formats.vqav2 import read_vqav2
from fuyu_e2e.eval.question import Question

READERS: Mapping[str, Callable[..., Iterator[Question]]] = {
    "vqav2": read_vqav2,
    "coco_captions": read_coco_captions,
    "textvqa": read_textvqa,
    "docvqa": read_docvqa,
}
