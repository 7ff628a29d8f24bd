"""The LightningDataModule, which turns shards into packed batches."""

import contextlib
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, IterableDataset

from fuyu_e2e.data.document import Document
from fuyu_e2e.data.lightning_internals import completed_rows
from fuyu_e2e.data.packing import LongDocuments, PackedRow
from fuyu_e2e.data.row_loader import RowDataset, RowLoader
from fuyu_e2e.data.sample_stats import SampleStats
from fuyu_e2e.data.sequence import Prompt, SequenceBuilder
from fuyu_e2e.data.shards.cache import CACHE_FOLDER, CACHE_GIGABYTES, ShardCache
from fuyu_e2e.data.shards.locations import expand_patterns, is_local
from fuyu_e2e.data.shards.manifest import ShardFacts, check_complete, facts_of, known_facts, totals
from fuyu_e2e.data.shards.mixture import Climb, MixBy, Source
from fuyu_e2e.data.shards.reading import read_documents
from fuyu_e2e.data.shards.splits import NamedShards, check_disjoint
from fuyu_e2e.data.shards.stream import Stream, StreamSource
from fuyu_e2e.data.tokenizer import Tokenizer
from fuyu_e2e.distributed import DataRank, any_rank, is_sharded
from fuyu_e2e.errors import UserError
from fuyu_e2e.model.image_layout import FUYU_LAYOUT, ImageLayout, ImagePolicy

Patterns = str | list[str] | None


class FuyuDataModule(pl.LightningDataModule):
    """Streams webdataset shards of any format as packed rows; a row is one micro-batch of a process.

    Args:
        tokenizer: A sentencepiece model, as `fuyu-e2e tokenizer train` writes it.
        patch_size: Side of a patch in pixels; the command line takes it from the decoder.
        train: Shards to train on: a path, URL, glob or brace pattern, a folder, or a list of them. Read endlessly.
        mixture: Several named sources instead of `train`, each with shards and a weight.
        climb: Makes the keys of the weights rungs of a ladder, and says when to climb it.
        val: Shards for `validate` and for validation during `fit`; read once.
        test: Shards for `test`; read once.
        predict: Shards for `predict`, which continues each document from before its last supervised text.
        budget: Tokens of a row.
        long_documents: Whether a document longer than a row is skipped (`skip`), or cut if the rest stays valid
            (`cut`); either is counted.
        max_patches: Patch budget of an image; a larger one is scaled down to it, a smaller one is never scaled up.
        max_size: Height and width in pixels, whole patches, that a larger image is scaled down to fit; the released
            Fuyu's is 1080 x 1920. If the budget allows it, transformers' processor scales all images to the same
            sizes, which `export --to transformers` requires. None scales to the budget alone.
        lanes: Sample streams that rows are drawn from in turn. With the seed it fixes the order of the data, so that
            it doesn't depend on processes and workers; a multiple of processes x workers.
        shuffle: Documents that each lane shuffles together. They are read from the shards, not held in memory.
        mix_by: Whether the weights of a mixture are shares of its `tokens` or of its `documents`.
        workers: Worker processes that read and decode; 0 reads in the training process.
        seed: Seeds the order of the data.
        layout: Views and tokens of an image; the command line takes it from the decoder's connector.
        cache_dir: The folder of this machine for downloaded shards.
        cache_gigabytes: The most that these may take up; the least recently used are deleted first.
        allow_pipe: Whether `pipe:COMMAND` may be given as a shard. The command runs in a shell.
    """

    def __init__(
        self,
        tokenizer: str,
        patch_size: int,
        train: Patterns = None,
        mixture: dict[str, Source] | None = None,
        climb: Climb | None = None,
        val: Patterns = None,
        test: Patterns = None,
        predict: Patterns = None,
        budget: int = 2048,
        long_documents: LongDocuments = "skip",
        max_patches: int = 1024,
        max_size: tuple[int, int] | None = None,
        lanes: int = 16,
        shuffle: int = 4096,
        mix_by: MixBy = "tokens",
        workers: int = 0,
        seed: int = 0,
        layout: ImageLayout = FUYU_LAYOUT,
        cache_dir: str = CACHE_FOLDER,
        cache_gigabytes: float = CACHE_GIGABYTES,
        allow_pipe: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("budget", budget), ("lanes", lanes), ("shuffle", shuffle)):
            if value < 1:
                raise UserError(f"data.{name} is {value}, but must be at least 1.")
        if workers < 0:
            raise UserError(f"data.workers is {workers}, but must be 0 (none) or above.")
        if not 0 <= cache_gigabytes < inf:
            raise UserError(f"data.cache_gigabytes is {cache_gigabytes}, but must be 0 or a number above.")
        self.tokenizer_path = Path(tokenizer)
        self.images = ImagePolicy(patch_size=patch_size, max_patches=max_patches, max_size=max_size)
        if train and mixture:
            raise UserError("Both data.train and data.mixture are set: leave one of them out.")
        self.patterns: dict[str, Patterns] = {"train": train, "val": val, "test": test, "predict": predict}
        self.mixture = mixture or {}
        if climb is not None:
            climb.check(self.mixture)
            if val is None:
                raise UserError(
                    "data.climb is set, but there is no data.val whose figures tell when to climb: name its shards."
                )
        self.climb = climb
        self.budget = budget
        self.long_documents: LongDocuments = long_documents
        self.lanes = lanes
        self.shuffle = shuffle
        self.mix_by: MixBy = mix_by
        self.workers = workers
        self.seed = seed
        self.layout = layout
        self.cache = ShardCache.at(cache_dir, cache_gigabytes)
        self.allow_pipe = allow_pipe
        self._stream_sources: dict[str, tuple[StreamSource, ...]] = {}
        self.row: PackedRow | None = None
        """The row being processed: the keys of its samples, and the stats of what was read for it."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return Tokenizer.from_file(self.tokenizer_path)

    @cached_property
    def builder(self) -> SequenceBuilder:
        """Turns the run's documents into sequences."""
        return SequenceBuilder(self.tokenizer, self.images, self.layout)

    def prepare_data(self) -> None:
        """Indexes local shards that no manifest lists, in one process of each machine.

        Leaves errors to `setup`, which raises them on all processes; raised here, the others would only learn that one
        process is gone.
        """
        assert self.trainer is not None
        assert self.trainer.state.fn is not None
        with contextlib.suppress(UserError):
            self._look_up(self.trainer.state.fn.value)

    def setup(self, stage: str) -> None:
        """Checks the shards that the stage is about to read.

        Raises:
            UserError: A pattern is missing or matches nothing, a shard differs from its manifest or is not a tar, two
                splits contain the same shard, or the tokenizer can't be read.
        """
        self._look_up(stage)
        assert self.tokenizer

    def _look_up(self, stage: str) -> None:
        """Indexes the shards that a stage reads, and compares them with those of the other splits.

        Of the other splits it compares only local shards with a manifest; the rest may not be here.
        """
        needed = [NamedShards(self._setting(split), self._facts(split)) for split in self._needed(stage)]
        if stage == "predict":  # anything may be continued
            return
        others = [split for split in ("train", "val", "test") if split not in self._needed(stage)]
        check_disjoint(needed, [NamedShards(self._setting(split), self._known_facts(split)) for split in others])

    def _setting(self, split: str) -> str:
        mixed = split == "train" and self.mixture
        named = [source.shards for source in self.mixture.values()] if mixed else [self.patterns[split] or []]
        patterns = [pattern for each in named for pattern in ([each] if isinstance(each, str) else each)]
        return f"data.{'mixture' if mixed else split} {', '.join(map(repr, patterns))}"

    def _facts(self, split: str) -> dict[str, ShardFacts]:
        return {
            shard: facts
            for source in self.stream_sources(split)
            for shard, facts in zip(source.shards, source.facts, strict=True)
        }

    def _known_facts(self, split: str) -> dict[str, ShardFacts]:
        with contextlib.suppress(UserError):  # the stage can do without them
            return known_facts(filter(is_local, self.shards(split)), self.cache)
        return {}

    def _needed(self, stage: str) -> list[str]:
        needed = {"fit": ["train"], "validate": ["val"], "test": ["test"], "predict": ["predict"]}[stage]
        return [*needed, "val"] if stage == "fit" and self.patterns["val"] is not None else needed

    def sources(self, split: str) -> dict[str, Source]:
        """Returns the sources of `train`, `val`, `test` or `predict` by name; a single source has the split's name.

        Raises:
            UserError: No source is set.
        """
        if split == "train" and self.mixture:
            return self.mixture
        patterns = self.patterns[split]
        if not patterns:
            raise UserError(f"data.{split} is not set: name the shards to read, as in --data.{split} 'folder/*.tar'.")
        return {split: Source(patterns)}

    def shards(self, split: str) -> tuple[str, ...]:
        """Returns the shards of all sources of a split.

        Raises:
            UserError: No pattern is set for them, or one matches nothing.
        """
        return tuple(shard for source in self.sources(split).values() for shard in self._expanded(split, source))

    def stream_sources(self, split: str) -> tuple[StreamSource, ...]:
        """Returns the sources of a split with the contents of their shards, looked up once.

        Indexes local shards that no manifest lists.

        Raises:
            UserError: A pattern matches nothing, or a shard differs from its manifest, is gone, or is not a tar.
        """
        if split in self._stream_sources:
            return self._stream_sources[split]
        found = []
        for name, source in self.sources(split).items():
            shards = self._expanded(split, source)
            check_complete(shards, self.cache)
            found.append(StreamSource(name=name, source=source, shards=shards, facts=facts_of(shards, self.cache)))
        self._stream_sources[split] = tuple(found)
        return self._stream_sources[split]

    def document_kinds(self) -> dict[str, int]:
        """Returns the number of usable training documents of each kind, as the manifests count them."""
        return dict(totals([facts for source in self.stream_sources("train") for facts in source.facts])["kinds"])

    def _expanded(self, split: str, source: Source) -> tuple[str, ...]:
        try:
            return expand_patterns(source.shards, allow_pipe=self.allow_pipe)
        except UserError as error:
            setting = "data.mixture" if split == "train" and self.mixture else f"data.{split}"
            raise UserError(f"{setting}: {error}") from error

    def documents(self, split: str, stats: SampleStats) -> Iterator[Document]:
        """Yields all documents of a split once, in stored order; unusable samples are counted in `stats`."""
        for shard in self.shards(split):
            yield from read_documents(self.cache.path(shard), stats, shard)

    def stream(self, split: str) -> Stream:
        """Returns the stream of a split: endless and shuffled for `train`, once and in stored order for the others."""
        training = split == "train"
        return Stream(
            sources=self.stream_sources(split),
            cache=self.cache,
            builder=self.builder,
            budget=self.budget,
            long_documents=self.long_documents,
            lanes=self.lanes if training else self._place.size * max(1, self.workers),
            shuffle=self.shuffle if training else 0,
            seed=self.seed,
            mix_by=self.mix_by,
            climb=self.climb if training else None,
            rows_per_step=self._place.size * (self.trainer.accumulate_grad_batches if self.trainer else 1),
        )

    def validation_prompts(self, count: int) -> list[Prompt]:
        """Returns the first usable documents of the validation shards as prompts."""
        return list(islice(self.builder.prompts(self.documents("val", SampleStats()), SampleStats()), count))

    @property
    def _place(self) -> DataRank:
        return DataRank.of(self.trainer)

    def _loader(self, split: str, completed: Callable[[], int] | None = None) -> "RowLoader":
        rows = RowDataset(self.stream(split), self._place.rank, self._place.size)
        pin = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        # Training rows never end. Of other rows, one process may have one more than the next.
        ends = split != "train"
        any_rank_has_rows = (
            partial(any_rank, self.trainer) if self.trainer and ends and is_sharded(self.trainer) else None
        )
        return RowLoader(rows, completed, any_rank_has_rows, batch_size=None, num_workers=self.workers, pin_memory=pin)

    def train_dataloader(self) -> "RowLoader":
        """Returns training rows without end, from where a resumed run stopped; repeats the first ones to overfit.

        Raises:
            UserError: The trainer would make a new loader in each epoch, which would start over; or it repeats rows,
                among which there is nothing to climb.
        """
        assert self.trainer is not None
        if self.trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            raise UserError(
                "trainer.reload_dataloaders_every_n_epochs would restart the stream of training data: leave it out."
            )
        overfit = self.trainer.overfit_batches  # type: ignore[attr-defined]
        again = isinstance(overfit, int) and overfit > 0
        if again and self.climb is not None:
            raise UserError(
                "trainer.overfit_batches repeats the first rows, whose weights data.climb can't change: leave one out."
            )
        return self._loader("train", None if again else partial(completed_rows, self.trainer))

    def val_dataloader(self) -> "RowLoader | list[RowLoader]":
        """Returns the rows of the validation shards, once; an empty list if the recipe names no shards."""
        return self._loader("val") if self.patterns["val"] is not None else []

    def test_dataloader(self) -> "RowLoader":
        """Returns the rows of the test shards, once."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Returns lists of 32 prompts to be continued."""
        self.prompt_tally = SampleStats()
        prompts = PromptDataset(self, self.prompt_tally)
        return DataLoader(prompts, batch_size=32, collate_fn=list, num_workers=0)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves a row's packed batch to the device, and stores the row as `row`; prompts stay on the host until
        packed.

        Lightning fetches rows ahead, but calls this when it starts to process one.
        """
        if not isinstance(batch, PackedRow):
            return batch
        self.row = batch
        return batch.batch.to(device)


class PromptDataset(IterableDataset):
    """Documents of `predict` as prompts; counts unusable ones in `stats`."""

    def __init__(self, data: FuyuDataModule, stats: SampleStats) -> None:
        self.data = data
        self.stats = stats

    def __iter__(self) -> Iterator[Prompt]:
        return self.data.builder.prompts(self.data.documents("predict", self.stats), self.stats)
