"""Shards in, packed batches out: the LightningDataModule."""

from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from fuyu_e2e.batch import PackedBatch
from fuyu_e2e.errors import UserError
from fuyu_e2e.image import ImagePolicy
from fuyu_e2e.packing import LongDocuments
from fuyu_e2e.sequence import Prompt, SequenceBuilder
from fuyu_e2e.shards.reading import check_shards, expand_patterns
from fuyu_e2e.shards.stream import Stream
from fuyu_e2e.tally import Tally
from fuyu_e2e.tokenizer import Tokenizer

Patterns = str | list[str] | None


class FuyuDataModule(pl.LightningDataModule):
    """Streams webdataset shards of any format as packed rows; one row is one micro-batch of a process.

    Args:
        tokenizer: A sentencepiece model, as `fuyu-e2e tokenizer train` writes it.
        patch_size: Side of a patch in pixels; the command line takes it from the decoder.
        train: Shards to train on: a path, glob or brace pattern, a folder, or a list of them. Read without end.
        val: Shards for `validate` and for validation during `fit`; read once.
        test: Shards for `test`; read once.
        predict: Shards for `predict`, whose documents are continued from before their last supervised text.
        budget: Tokens of a row.
        long_documents: Whether a document longer than a row is left out (`skip`) or cut where the rest stays
            valid (`cut`); either is counted.
        max_patches: Patch budget of an image; a larger one is scaled down to it, a smaller one never up.
        lanes: Sample streams that rows are drawn from in turn. Fixes the order of the data together with the
            seed, so that it doesn't depend on processes and workers; a multiple of processes x workers.
        shuffle: Documents in each lane's shuffle buffer.
        workers: Worker processes that read and decode; 0 does it in the training process.
        seed: Seeds the order of the data.
    """

    def __init__(
        self,
        tokenizer: str,
        patch_size: int,
        train: Patterns = None,
        val: Patterns = None,
        test: Patterns = None,
        predict: Patterns = None,
        budget: int = 2048,
        long_documents: LongDocuments = "skip",
        max_patches: int = 1024,
        lanes: int = 8,
        shuffle: int = 256,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("budget", budget), ("lanes", lanes), ("shuffle", shuffle)):
            if value < 1:
                raise UserError(f"data.{name} is {value}, but must be at least 1.")
        self.tokenizer_path = Path(tokenizer)
        self.images = ImagePolicy(patch_size=patch_size, max_patches=max_patches)
        self.patterns: dict[str, Patterns] = {"train": train, "val": val, "test": test, "predict": predict}
        self.budget = budget
        self.long_documents: LongDocuments = long_documents
        self.lanes = lanes
        self.shuffle = shuffle
        self.workers = workers
        self.seed = seed

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run."""
        return Tokenizer.from_file(self.tokenizer_path)

    @cached_property
    def builder(self) -> SequenceBuilder:
        """Turns the documents of the run into sequences."""
        return SequenceBuilder(self.tokenizer, self.images)

    def setup(self, stage: str) -> None:
        """Checks the shards that the stage is about to read.

        Raises:
            UserError: A pattern is missing or matches nothing, a file is not a tar, the tokenizer can't be read.
        """
        needed = {"fit": ["train"], "validate": ["val"], "test": ["test"], "predict": ["predict"]}[stage]
        if stage == "fit" and self.patterns["val"] is not None:
            needed.append("val")
        for split in needed:
            check_shards(self.shards(split))
        assert self.tokenizer

    def shards(self, split: str) -> tuple[str, ...]:
        """The shards of `train`, `val`, `test` or `predict`.

        Raises:
            UserError: No pattern was given for them, or it matches nothing.
        """
        patterns = self.patterns[split]
        if patterns is None:
            raise UserError(f"data.{split} is not set: name the shards to read, as in --data.{split} 'folder/*.tar'.")
        return expand_patterns(patterns)

    def stream(self, split: str) -> Stream:
        """The stream of a split: endless and shuffled for `train`, once and in stored order for the others."""
        training = split == "train"
        return Stream(
            shards=self.shards(split),
            builder=self.builder,
            budget=self.budget,
            long_documents=self.long_documents,
            lanes=self.lanes if training else self._world_size * max(1, self.workers),
            shuffle=self.shuffle if training else 0,
            seed=self.seed,
        )

    def validation_prompts(self, count: int) -> list[Prompt]:
        """The first usable documents of the validation shards, as prompts to be continued."""
        stream = self.stream("val")
        return list(islice(stream.builder.prompts(stream.documents(Tally()), Tally()), count))

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def _loader(self, split: str, consumed: Callable[[], int] | None = None) -> "RowLoader":
        rank = self.trainer.global_rank if self.trainer else 0
        rows = RowDataset(self.stream(split), rank, self._world_size)
        pin = torch.cuda.is_available()
        return RowLoader(rows, consumed, batch_size=None, num_workers=self.workers, pin_memory=pin)

    def train_dataloader(self) -> "RowLoader":
        """Rows without end, continued where a resumed run stopped."""
        assert self.trainer is not None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        # Batches whose step is done: Lightning fetches one ahead, so counting what the loader gave would be wrong.
        return self._loader("train", lambda: progress.total.processed)  # type: ignore[attr-defined]

    def val_dataloader(self) -> "RowLoader | list[RowLoader]":
        """The rows of the validation shards, once; none where the recipe names no shards."""
        return self._loader("val") if self.patterns["val"] is not None else []

    def test_dataloader(self) -> "RowLoader":
        """The rows of the test shards, once."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Lists of 32 prompts to be continued."""
        self.prompt_tally = Tally()
        prompts = PromptDataset(self.stream("predict"), self.prompt_tally)
        return DataLoader(prompts, batch_size=32, collate_fn=list, num_workers=0)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves packed batches; prompts stay on the host until they are packed."""
        return batch.to(device) if isinstance(batch, PackedBatch) else batch


class RowDataset(IterableDataset):
    """The rows of one process, shared out among its workers so that their order is that of one worker."""

    def __init__(self, stream: Stream, rank: int, world_size: int) -> None:
        self.stream = stream
        self.rank = rank
        self.world_size = world_size
        self.start = 0

    def __iter__(self) -> Iterator[PackedBatch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # The loader asks worker 0 first, whose turn it is not where an odd number of rows was consumed before.
        turn = (worker + self.start) % workers
        consumed = max(0, -(-(self.start - turn) // workers))
        reader = self.rank + self.world_size * turn
        return self.stream.rows(reader, self.world_size * workers, consumed)


class RowLoader(DataLoader):
    """A loader that Lightning can stop and resume: its state is the number of rows consumed.

    Args:
        dataset: The rows of this process.
        consumed: How many rows are consumed by now; None for a loader that always begins at its first row.
        options: As in torch's DataLoader.
    """

    def __init__(self, dataset: RowDataset, consumed: Callable[[], int] | None, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.rows = dataset
        self.consumed = consumed

    def __iter__(self) -> Any:
        self.rows.start = self.consumed() if self.consumed else 0
        return super().__iter__()

    def state_dict(self) -> dict[str, int]:
        """The rows consumed."""
        return {"rows": self.consumed() if self.consumed else 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Checks that Lightning's own count, which the loader goes by, is the one that was saved.

        Raises:
            UserError: The counts differ, as after a change of the number of processes.
        """
        if self.consumed and self.consumed() != state["rows"]:
            raise UserError(f"The checkpoint was saved after {state['rows']} rows, not {self.consumed()}.")


class PromptDataset(IterableDataset):
    """The documents of a stream as prompts to be continued; what can't be used is counted in `tally`."""

    def __init__(self, stream: Stream, tally: Tally) -> None:
        self.stream = stream
        self.tally = tally

    def __iter__(self) -> Iterator[Prompt]:
        return self.stream.builder.prompts(self.stream.documents(self.tally), self.tally)
