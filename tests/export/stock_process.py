"""Runs stock transformers in a process of its own: as a user who has an exported folder and nothing of this project.

    python stock_process.py FOLDER|SCRIPT...

Each folder of an exported model holds `asked.json` with images, texts and the number of new tokens, and gets
`answered.safetensors`: what the stock processor, tokenizer and model make of them. A script is run.
"""

import json
import sys
from pathlib import Path

import torch


def let_torchvision_load() -> None:
    """The package index has torchvision built for CUDA: beside a CPU build of torch its kernels don't load, and then
    importing it fails at the first of them that it describes. The image processor uses none.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        kernels = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            kernels.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["kernels"] = kernels  # they are gone with this object


def answer(folder: Path) -> dict[str, torch.Tensor]:
    """What stock software makes of a folder's questions."""
    from transformers import AutoProcessor, AutoTokenizer, FuyuForCausalLM, FuyuProcessor
    from transformers.image_utils import load_image

    asked = json.loads((folder / "asked.json").read_text())
    model, loading = FuyuForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    processor, tokenizer = AutoProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(processor, FuyuProcessor)
    assert type(FuyuProcessor.from_pretrained(folder)) is type(processor)
    images = [load_image(str(folder / name)) for name in asked["images"]]
    inputs = processor(images=images, text=asked["texts"], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
        written = model.generate(**inputs, max_new_tokens=asked["new_tokens"], do_sample=False, eos_token_id=None)
    alone = [tokenizer(text, add_special_tokens=False).input_ids for text in asked["alone"]]
    decoded = [tokenizer.decode(ids) for ids in alone]
    assert decoded == asked["alone"], decoded
    return {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "patches": inputs["pixel_values"] if "pixel_values" in inputs else inputs["image_patches"],
        "logits": logits,
        "written": written[:, inputs["input_ids"].shape[1] :],
        "begin": torch.tensor(tokenizer("a").input_ids[:1]),
        **{f"alone.{number}": torch.tensor(ids) for number, ids in enumerate(alone)},
    }


if __name__ == "__main__":
    let_torchvision_load()
    torch.set_num_threads(1)
    from safetensors.torch import save_file

    for name in sys.argv[1:]:
        if name.endswith(".py"):
            exec(compile(Path(name).read_text(), name, "exec"), {})
            continue
        answers = {key: tensor.contiguous() for key, tensor in answer(Path(name)).items()}
        save_file(answers, Path(name) / "answered.safetensors")
