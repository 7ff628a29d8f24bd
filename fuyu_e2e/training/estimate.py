"""`fuyu-e2e estimate`: the memory and time of a recipe, before anything starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser

from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.data.packing import Packer, pack_row
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.errors import UnusableSampleError, UserError
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.cost import Cost, cost
from fuyu_e2e.model.memory import Memory, Precision, memory
from fuyu_e2e.training.device_limits import matmul_rate, named_peak
from fuyu_e2e.training.settings.arguments import values_of
from fuyu_e2e.training.settings.own_options import add_estimate_options
from fuyu_e2e.training.settings.recipe import RecipeReader

ASSUMED_DOCUMENT = 512
"""Tokens of a document if the recipe names no data: half of them patches, a quarter supervised."""
PRECISIONS: dict[str, Precision] = {
    "32": "32-true",
    "32-true": "32-true",
    "16-mixed": "bf16-mixed",
    "bf16-mixed": "bf16-mixed",
    "16-true": "bf16-true",
    "bf16-true": "bf16-true",
}
"""Lightning's precision names, and which of ours needs the same memory and time."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The contents of one row of the run."""

    document_lengths: tuple[int, ...]
    patches: int
    targets: int
    source: str
    """The source of these numbers, in words."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The expected cost of a run."""

    cost: Cost
    """Cost of one row."""
    memory: Memory
    """Memory of each process."""
    row: Row
    precision: Precision
    processes: int
    rows: int
    """Rows of the whole run, over all processes; 0 if it has no end."""
    device: str
    rate: float
    """Operations per second of one device."""
    mfu: float
    """Fraction of that rate that the run is assumed to reach."""

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.rows * self.cost.tokens

    @property
    def hours(self) -> float:
        """Hours that the whole run takes."""
        return self.rows * self.cost.training_flops / (self.rate * self.mfu * self.processes) / 3600


def estimated(args: Sequence[str]) -> Estimate:
    """Returns the estimate for a command line, `--config RECIPE` and any settings.

    Raises:
        UserError: A setting is wrong, or the device or precision is unknown.
    """

    def add_options(parser: LightningArgumentParser) -> None:
        add_estimate_options(parser)
        if values_of(args, "--device")[0]:
            parser.set_defaults({"trainer.precision": "bf16-mixed"})  # FuyuCLI's default on a GPU

    cli = RecipeReader(args, add_options)
    if cli.datamodule.tokenizer_path.is_file():  # else the named size's own vocabulary
        cli.model.fit_vocabulary(cli.datamodule)
    settings, config = cli.config.trainer, cli.model.config
    counts = {
        "trainer.num_nodes": settings.num_nodes,
        "trainer.accumulate_grad_batches": settings.accumulate_grad_batches,
        "rows_per_step": cli.config.rows_per_step,
    }
    for name, value in counts.items():  # `fit` refuses them at its start
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}, but must be at least 1.")
    if not 0 < cli.config.mfu <= 1:
        raise UserError(f"--mfu is {cli.config.mfu}, but is a share: set it above 0 and at most 1.")
    named = cli.config.device
    asked = str(settings.precision or "32-true")
    if asked not in PRECISIONS:
        raise UserError(f"trainer.precision {asked} can't be estimated: it has to be one of {', '.join(PRECISIONS)}.")
    precision = PRECISIONS[asked]
    dtype = torch.float32 if precision == "32-true" else torch.float16 if asked[0] == "1" else torch.bfloat16
    here = "cuda" if torch.cuda.is_available() and settings.accelerator != "cpu" else "cpu"
    row = _row(cli.datamodule, config)
    processes = _devices(settings.devices, here if named is None else "named") * settings.num_nodes
    return Estimate(
        cost=cost(
            config,
            document_lengths=row.document_lengths,
            grids=[(1, row.patches)],
            targets=row.targets,
            done=None,
        ),
        memory=memory(
            config,
            tokens=cli.datamodule.budget,
            patches=row.patches,
            targets=row.targets,
            optimizer=cli.model.optimizer_config.name,
            precision=precision,
            processes=processes,
        ),
        row=row,
        precision=precision,
        processes=processes,
        rows=max(0, settings.max_steps) * (cli.config.rows_per_step or settings.accumulate_grad_batches * processes),
        device=named or (torch.cuda.get_device_name() if here == "cuda" else f"{torch.get_num_threads()} CPU threads"),
        rate=named_peak(named, dtype) if named is not None else matmul_rate(here, dtype, rounds=3),
        mfu=cli.config.mfu,
    )


def _row(data: FuyuDataModule, config: FuyuConfig) -> Row:
    """Returns a row of the run's data, or an assumed one if the recipe names no data."""
    if not (data.patterns["train"] or data.mixture):
        length = min(ASSUMED_DOCUMENT, data.budget)
        documents = data.budget // length
        return Row(
            document_lengths=(length,) * documents,
            patches=documents * length // 2,
            targets=documents * length // 4,
            source=f"assumed: documents of {length} tokens, half of them patches, a quarter supervised, as the recipe "
            "names no data.train",
        )
    stats = SampleStats()
    packer = Packer(data.budget, data.long_documents, stats)
    while not packer.full:  # training reads its shards over and over, too
        for document in data.documents("train", stats):
            try:
                packer.add(data.builder.build(document))
            except UnusableSampleError as error:
                stats.skip(error)
            if packer.full:
                break
        if not packer.waiting:
            raise UserError(f"data.train holds no usable sample ({stats.summary()}).")
    batch = pack_row(packer.fill_row())
    return Row(
        document_lengths=batch.document_lengths,
        patches=len(batch.patches),
        targets=len(batch.targets),
        source="the first row of data.train",
    )


def _devices(asked: Any, where: str) -> int:
    """Returns the number of devices that a Lightning setting names; `auto` is all GPUs of this machine, or one CPU.

    Raises:
        UserError: It names none.
    """
    if str(asked) in ("auto", "-1"):
        return max(1, torch.cuda.device_count()) if where == "cuda" else 1
    listed = asked if isinstance(asked, list) else str(asked).strip(",").split(",")
    if str(asked) == "0" or not all(str(one).isdigit() for one in listed):
        raise UserError(f"trainer.devices is {asked!r}, but must be at least 1, or auto.")
    return int(asked) if str(asked).isdigit() else len(listed)


def show(found: Estimate) -> None:
    """Prints an estimate as text."""
    lengths = found.row.document_lengths
    parts = found.memory
    lines = [
        ("parameters", f"{found.cost.parameters:,}"),
        ("row", f"{sum(lengths):,} tokens in {len(lengths)} documents ({found.row.source})"),
        ("operations a token", f"{found.cost.training_flops_per_token:.3g} in training, attention by document"),
        ("memory a process", f"{_size(parts.total)}, {found.precision}"),
        *(
            (f"  {name.replace('_', ' ')}", _size(getattr(parts, name)))
            for name in ("weights", "gradients", "optimizer_state", "activations", "logits")
        ),
        ("device", f"{found.processes} x {found.device}: {found.rate:.3g} operations/s, of which {found.mfu:.0%} are "
                   "assumed to be reached (--mfu)"),
    ]  # fmt: skip
    if found.rows:
        lines += [("tokens of the run", f"{found.tokens:.4g}"), ("hours of the run", f"{found.hours:.3g}")]
    else:
        lines.append(("tokens of the run", "no end: trainer.max_steps is not set"))
    for name, value in lines:
        print(f"{name:20} {value}")
    print(
        "Memory is that of tensors; CUDA's context and the process itself come on top. On a CPU, glibc may hold twice "
        "that unless MALLOC_MMAP_THRESHOLD_=65536 is set."
    )


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
