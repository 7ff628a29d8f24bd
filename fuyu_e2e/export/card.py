"""The README of an exported folder: what the model is, how it was trained, and how to run it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from fuyu_e2e.checkpoint.loading import StoredModel
from fuyu_e2e.export.transformers import SUPPORTED, largest_size, scales_alike
from fuyu_e2e.model.cost import cost
from fuyu_e2e.model.decoder import meta_decoder
from fuyu_e2e.version import __version__

Use = Literal["caption", "chat"]
QUESTION = "What is it?"
"""The question in examples, unless another is given."""

_USES: dict[Use, str] = {
    "caption": "It writes captions of pictures",
    "chat": "It answers questions about pictures",
}
_OWN_PROMPTS: dict[Use, str] = {
    "caption": 'prompt = processor(Path("a.png"))\n',
    "chat": 'prompt = processor(Path("a.png"), {question})\n',
}
_OWN = """from pathlib import Path
import fuyu_e2e

model, processor = fuyu_e2e.load({folder})
{prompt}[tokens] = fuyu_e2e.generate(model, [prompt], max_new_tokens=64, eos_id=processor.eos_id)
print(processor.decode(tokens))"""
_STOCK_PROMPTS: dict[Use, str] = {
    "caption": """inputs = processor(images=image, text="", return_tensors="pt")
for name in ("input_ids", "attention_mask"):
    inputs[name] = inputs[name][:, :-1]  # the processor begins an answer, which a caption has not
""",
    "chat": 'inputs = processor(images=image, text={question}, return_tensors="pt")\n',
}
_STOCK = """from PIL import Image, ImageOps
from transformers import AutoProcessor, FuyuForCausalLM

model, processor = FuyuForCausalLM.from_pretrained({folder}), AutoProcessor.from_pretrained({folder})
image = ImageOps.exif_transpose(Image.open("a.png")).convert("RGBA")
image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
{prompt}tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(tokens, skip_special_tokens=True))"""


def find_recipe(source: Path) -> str | None:
    """Returns the recipe of a checkpoint's run or of an exported folder; None if there is none."""
    for place in (source / "recipe.yaml", source.parent / "config.yaml", source.parent.parent / "config.yaml"):
        if place.is_file():
            return place.read_text(encoding="utf-8")
    return None


def uses_of(documents: Mapping[str, int]) -> list[Use]:
    """Returns how to prompt a model that was trained on documents of these kinds; both ways if they are unknown.

    Text after an image in an interleaved document starts like a caption.
    """
    captions = documents.get("caption", 0) + documents.get("interleaved", 0)
    counts: dict[Use, int] = {"caption": captions, "chat": documents.get("chat", 0)}
    return [use for use, count in counts.items() if count] or list(counts)


def card(
    stored: StoredModel,
    *,
    name: str,
    licence: str | None,
    recipe: str | None,
    for_transformers: bool,
    question: str = QUESTION,
) -> str:
    """Returns the text of the card, with the front matter that the Hugging Face Hub reads.

    Args:
        stored: The model.
        name: Name of the folder.
        licence: Licence identifier of the weights; None if not stated.
        recipe: The recipe of the training.
        for_transformers: Whether the folder is for transformers.
        question: The example's question to a model that was trained on questions.
    """
    config, images, told = stored.metadata.config, stored.metadata.images, stored.provenance
    parameters = cost(config, document_lengths=(1,), grids=(), targets=0).parameters
    blocks = f"{config.layers} blocks"
    for block, those in meta_decoder(config).other_kinds.items():
        blocks += f", of which {len(those)} are {block.kind}" + (f" ({block.method})" if block.method else "")
    limit = f"at most {images.max_patches:,} an image"
    if images.max_size is not None:
        limit += f", scaled down to fit {images.max_size[0]} x {images.max_size[1]} pixels"
    tokenizer = stored.metadata.tokenizer
    documents = ", ".join(f"{count:,} {kind}" for kind, count in sorted(told.documents.items()))
    rows = {
        "optimizer steps": f"{told.step:,}" if told.step else "not trained here",
        "tokens seen": f"{told.tokens_seen:,}",
        "weights": "averaged over training (EMA)" if told.averaged else "not averaged",
        **({"documents": documents} if documents else {}),
        **{f"data: {name}": f"sha256 over the shards' checksums: `{digest}`" for name, digest in told.data.items()},
        **{figure: f"{value:.6g}" for figure, value in sorted(told.validation.items())},
        "tokenizer": f"{tokenizer.vocab_size:,} tokens, sha256 `{tokenizer.digest}`",
        "written by": f"fuyu-e2e {__version__}",
    }
    parts = [
        "---",
        f"license: {licence or 'other'}",
        *([] if licence else ["license_name: not-stated"]),
        f"library_name: {'transformers' if for_transformers else 'fuyu_e2e'}",
        "pipeline_tag: image-text-to-text",
        "tags: [fuyu, encoder-free]",
        "---",
        "",
        f"# {name}",
        "",
        "A decoder transformer that reads raw image patches and text in one sequence; there is no vision encoder.",
        f"{parameters:,} parameters: {blocks} of width {config.width:,} in the dialect `{config.dialect}`, patches of "
        f"{images.patch_size} x {images.patch_size} pixels, {limit}.",
        "",
        *_examples(uses_of(told.documents), name, question, for_transformers),
    ]
    if for_transformers:
        parts += [
            f"Made for transformers {SUPPORTED}, whose processor needs torchvision and takes one image a prompt.",
            "",
        ]
        if not scales_alike(images):
            height, width = largest_size(images)
            parts += [
                f"In training, images of more than {images.max_patches:,} patches were scaled down to that budget. "
                f"The processor scales images larger than {height} x {width} pixels down to fit that size instead. "
                "Images within both limits are treated alike.",
                "",
            ]
    parts += [
        "## How it was trained",
        "",
        "| | |",
        "|---|---|",
        *(f"| {what} | {value} |" for what, value in rows.items()),
        "",
        "## Licences",
        "",
        f"- weights: {licence or 'not stated; whoever publishes them says so here'}",
        "- training data: to be stated by whoever publishes the weights",
    ]
    if recipe is not None:
        parts += ["", "## Recipe", "", "```yaml", recipe.rstrip(), "```"]
    return "\n".join(parts) + "\n"


def _examples(uses: list[Use], folder: str, question: str, for_transformers: bool) -> list[str]:
    """Returns the example code, to be run next to the folder and a picture `a.png`, as lines of the card."""
    template, prompts = (_STOCK, _STOCK_PROMPTS) if for_transformers else (_OWN, _OWN_PROMPTS)
    lines = []
    for use in uses:
        prompt = prompts[use].format(question=json.dumps(question, ensure_ascii=False))
        code = template.format(folder=json.dumps(folder, ensure_ascii=False), prompt=prompt)
        lines += [f"{_USES[use]}:", "", "```python", code, "```", ""]
    return lines
