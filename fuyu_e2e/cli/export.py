"""`fuyu-e2e export` and `fuyu-e2e import`."""

from collections.abc import Sequence
from pathlib import Path

from fuyu_e2e.cli.starting import starting
from fuyu_e2e.errors import UserError
from fuyu_e2e.training.settings.arguments import CommandParser, add_allow_imports


def export(args: Sequence[str]) -> int:
    """Writes a trained model as files that other software loads."""
    parser = CommandParser(prog="fuyu-e2e export", description=export.__doc__)
    add_allow_imports(parser)
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="A checkpoint, a run's directory (its best checkpoint by validation, else its newest), or an exported "
        "folder.",
    )
    parser.add_argument("--out", required=True, help="The folder to write.")
    parser.add_argument(
        "--to",
        choices=("fuyu-e2e", "transformers"),
        default="fuyu-e2e",
        help="Who loads it: fuyu_e2e.load, or transformers' FuyuForCausalLM and FuyuProcessor (default: %(default)s).",
    )
    parser.add_argument("--averaged", action="store_true", help="Averaged weights (EMA) of a run that kept them.")
    parser.add_argument("--license", help="Licence of the weights for the card, as the Hub spells it: apache-2.0, ...")
    parser.add_argument(
        "--tokenizer-json", help="With --to transformers, for an imported model: the fast tokenizer it came with."
    )
    parser.add_argument(
        "--accept-other-scaling",
        action="store_true",
        help="With --to transformers: export a model although transformers' processor scales large images otherwise "
        "than training did.",
    )
    options = parser.parse_args(args)
    for name in ("tokenizer_json", "accept_other_scaling"):
        if options.to != "transformers" and getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')} only goes with --to transformers: leave it out, or add that.")

    with starting():
        from fuyu_e2e.checkpoint.loading import read_model
        from fuyu_e2e.export.folders import check_scaling, chosen_checkpoint, export_own, export_to_transformers
        from fuyu_e2e.export.tokenizer_json import read_fast_tokenizer

    out = Path(options.out)
    checkpoint, reason = chosen_checkpoint(Path(options.checkpoint))
    stored = read_model(checkpoint, averaged=options.averaged)
    if options.to == "transformers":
        if not options.accept_other_scaling:
            check_scaling(stored)
        named, tokenizer = options.tokenizer_json, stored.metadata.tokenizer
        fast = None if named is None else read_fast_tokenizer(Path(named), tokenizer)
        export_to_transformers(stored, out, options.license, fast)
    else:
        export_own(stored, out, options.license)
    print(f"{out}: {len(stored.weights)} tensors of step {stored.provenance.step:,} from {stored.source}{reason}")
    return 0


def import_model(args: Sequence[str]) -> int:
    """Turns transformers' FuyuForCausalLM folder, such as the released Fuyu-8B, into a model to continue with."""
    parser = CommandParser(prog="fuyu-e2e import", description=import_model.__doc__)
    parser.add_argument("--from", dest="source", required=True, help="The folder, with config.json and safetensors.")
    parser.add_argument("--out", required=True, help="The folder to write.")
    parser.add_argument("--tokenizer", help="The sentencepiece model, where it is not the folder's tokenizer.model.")
    options = parser.parse_args(args)

    with starting():
        from fuyu_e2e.export.folders import RECIPE, import_folder

    out = Path(options.out)
    stored = import_folder(Path(options.source), out, Path(options.tokenizer) if options.tokenizer else None)
    print(
        f"{out}: {len(stored.weights)} tensors in the dialect {stored.metadata.config.dialect!r}\n"
        f"Train on:  fuyu-e2e fit --config {out / RECIPE} --data.train 'FOLDER/train-*.tar'\n"
        f"Ask it:    fuyu-e2e generate --checkpoint {out} --image PICTURE.png --prompt '...'"
    )
    return 0
