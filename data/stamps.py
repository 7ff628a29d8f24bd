"""Writes the shards of the stamps task: `python data/stamps.py --out runs/stamps/data`."""

import shutil
import subprocess
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.shards.reading import read_documents
from fuyu_e2e.data.tokenizer import train_tokenizer
from fuyu_e2e.errors import UserError
from fuyu_e2e.tasks.stamp_kinds import read_kinds
from fuyu_e2e.tasks.stamps import TEST_SEED, VOCAB_SIZE, Pictures, Split, write_shards

PACKAGE = "tuxpaint-stamps-default"
INSTALLED = Path("/usr/share/tuxpaint/stamps")
"""The package's folder where it is installed."""


@contextmanager
def find_stamps(named: Path | None) -> Iterator[Path]:
    """Yields a folder of stamps: the named one, the installed one, or a download that is removed afterwards.

    Raises:
        UserError: None of them is to be had.
    """
    if named or INSTALLED.is_dir():
        yield named or INSTALLED
        return
    advice = (
        f"unpack Debian's package {PACKAGE} (https://packages.debian.org/{PACKAGE}) and name its folder "
        "usr/share/tuxpaint/stamps by --stamps."
    )
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise UserError(f"There is no {INSTALLED}, and no apt-get and dpkg-deb to download it with: {advice}")
    with TemporaryDirectory() as folder:
        # Neither needs root.
        downloaded = subprocess.run(["apt-get", "download", "--quiet", PACKAGE], cwd=folder, check=False)
        packages = list(Path(folder).glob("*.deb"))
        if downloaded.returncode or not packages:
            raise UserError(f"apt-get can't download {PACKAGE}: run apt-get update as root, or {advice}")
        subprocess.run(["dpkg-deb", "-x", str(packages[0]), folder], check=True)
        yield Path(folder) / INSTALLED.relative_to("/")


def main(args: Sequence[str] | None = None) -> None:
    """Writes pictures of stamps to train, validate and test on, and a tokenizer trained on their names."""
    parser = ArgumentParser(prog="python data/stamps.py", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/stamps/data"), help="Folder (default: %(default)s).")
    parser.add_argument(
        "--stamps", type=Path, help=f"Folder of the stamps (default: {INSTALLED}, or else the package is downloaded)."
    )
    parser.add_argument(
        "--pictures",
        type=int,
        default=80_000,
        help="To train on; half as many of single stamps, to begin with (default: %(default)s).",
    )
    parser.add_argument("--test-pictures", type=int, default=1_800, help="Of each test (default: %(default)s).")
    parser.add_argument("--seed", type=int, default=0, help="Of the training pictures (default: %(default)s).")
    parser.add_argument("--processes", type=int, default=2, help="Shards written at once (default: %(default)s).")
    options = parser.parse_args(args)
    splits: tuple[tuple[Split, int, int], ...] = (
        ("train", options.seed, options.pictures),
        ("train-one", options.seed, options.pictures // 2),
        ("val", TEST_SEED, 270),
        ("test", TEST_SEED, options.test_pictures),
        ("test-new-combinations", TEST_SEED, options.test_pictures),
        ("test-new-photographs", TEST_SEED, options.test_pictures),
    )
    options.out.mkdir(parents=True, exist_ok=True)
    shards = {}
    with find_stamps(options.stamps) as folder:
        kinds = read_kinds(folder)
        for split, seed, count in splits:
            pictures = Pictures(split=split, seed=seed, kinds=kinds)
            shards[split] = write_shards(options.out, pictures, count, processes=options.processes)
    texts = (text for document in read_documents(shards["train"][0], SampleStats()) for text in document.texts)
    train_tokenizer(texts, VOCAB_SIZE).save(options.out / "tokenizer.model")
    stamps = sum(len(kind.stamps) for kind in kinds)
    print(f"{options.pictures:,} training pictures of {len(kinds)} kinds with {stamps} stamps: {options.out}")


if __name__ == "__main__":
    main()
