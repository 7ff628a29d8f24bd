"""Readers of public benchmarks, by their names in task files.

Each takes the benchmark's published files, a prompt, and stats in which it counts.
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
