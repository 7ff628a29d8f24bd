"""COCO captions: a file with several captions of each image."""

from collections.abc import Iterator
from pathlib import Path

from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.errors import UserError
from fuyu_e2e.eval.formats.asking import QUESTION, Entry, ask
from fuyu_e2e.eval.formats.json_file import load
from fuyu_e2e.eval.question import Question


def read_coco_captions(
    annotations: str | Path, images: str | Path, *, stats: SampleStats, prompt: str = ""
) -> Iterator[Question]:
    """Returns one question for each image of COCO captions: what does it show?

    Args:
        annotations: `captions_val2014.json` or another file in its format.
        images: The folder with the images, by their `file_name`.
        stats: Counts the images that are read.
        prompt: The text after each image; empty for none, as for a model that learns captions.

    Returns:
        Each image with all its captions as references.

    Raises:
        UserError: A file or an image is missing or violates the format; names the entry.
    """
    if QUESTION in prompt:
        raise UserError(f"prompt is {prompt!r}, but captions answer no question: leave {QUESTION} out.")
    described = load(annotations)
    captions: dict[str, list[str]] = {record.identity("id"): [] for record in described.records("images")}
    for record in described.records("annotations"):
        image = record.identity("image_id")
        if image not in captions:
            raise UserError(f"{record.where}: there is no image {image} in the list of images.")
        captions[image].append(record.text("caption"))
    entries = []
    for record in described.records("images"):
        key = record.identity("id")
        if not captions[key]:
            raise UserError(f"{record.where}: there is no caption of image {key}.")
        references = tuple(captions[key])
        entries.append(Entry(key=key, image=record.text("file_name"), prompt=prompt, references=references))
    return ask(entries, annotations, images, stats)
