"""`fuyu-e2e routing`: how much depth each token of a prompt gets."""

from collections.abc import Sequence

from fuyu_e2e.cli.prompting import PROMPT_HELP, add_max_new_tokens, add_model_and_images, prompt_parts
from fuyu_e2e.cli.starting import starting
from fuyu_e2e.training.settings.arguments import CommandParser


def routing(args: Sequence[str]) -> int:
    """Shows how many routed blocks each token of a prompt and of its continuation passes, as a picture."""
    parser = CommandParser(prog="fuyu-e2e routing", description=routing.__doc__)
    add_model_and_images(parser)
    parser.add_argument("--prompt", default="", help=PROMPT_HELP)
    parser.add_argument("--out", default="map.png", help="Where the picture goes (default: %(default)s).")
    add_max_new_tokens(parser)
    options = parser.parse_args(args)

    with starting():
        from fuyu_e2e.checkpoint.loading import load_model
        from fuyu_e2e.data.processor import Processor
        from fuyu_e2e.inference.depth import token_depth
        from fuyu_e2e.inference.depth_map import depth_map
        from fuyu_e2e.inference.device import autocast, find_device
        from fuyu_e2e.inference.generation import generate

    device = find_device(options.device)
    model = load_model(options.checkpoint, device)
    prompt = Processor(model.builder)(*prompt_parts(options.image, options.prompt))
    eos_id = model.tokenizer.eos_id
    with autocast(device):
        [written] = generate(model.decoder, [prompt], max_new_tokens=options.max_new_tokens, eos_id=eos_id)
        depth = token_depth(model.decoder, prompt, written)
    depth_map(depth, model.tokenizer).save(options.out)
    print(f"{model.tokenizer.decode(written)}\n\nShare of the {len(depth.blocks)} routed blocks that tokens passed:")
    for name, share in depth.shares.items():
        print(f"  {name:8} {share:6.1%}")
    print(f"The heat map: {options.out}")
    return 0
