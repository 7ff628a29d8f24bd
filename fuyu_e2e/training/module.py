"""The LightningModule: loss, optimizer, logging, and the contents of a checkpoint."""

from dataclasses import replace
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fuyu_e2e.checkpoint.loading import build_decoder, load_weights, read_model
from fuyu_e2e.checkpoint.metadata import SECTION, ModelMetadata
from fuyu_e2e.data.datamodule import FuyuDataModule
from fuyu_e2e.data.lightning_internals import count_steps, steps_between_logs
from fuyu_e2e.data.sequence import Prompt
from fuyu_e2e.distributed import DataRank, sum_over_ranks
from fuyu_e2e.errors import UserError
from fuyu_e2e.inference.generation import continue_texts
from fuyu_e2e.model.attention.kernels import AttentionBackend
from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.config import FuyuConfig, SizeName, named_size
from fuyu_e2e.model.decoder import ActivationCheckpointing, Decoder
from fuyu_e2e.model.float8 import use_float8
from fuyu_e2e.model.image_layout import most_tokens, same_layout
from fuyu_e2e.model.parallel import TENSOR, gather_weights, shard
from fuyu_e2e.model.routing.config import RoutingConfig
from fuyu_e2e.model.row import Row, TrainingProgress
from fuyu_e2e.training.callbacks.checkpoints import checkpoints_of
from fuyu_e2e.training.gradients import clamp_gradients, scale_gradients, squared_norm_part, weights_of
from fuyu_e2e.training.metrics import Mean, evaluation_metrics, evaluation_sums
from fuyu_e2e.training.optimizers import MuonAdamW, OptimizerConfig, build_optimizer
from fuyu_e2e.training.resume import restore, training_settings
from fuyu_e2e.training.schedule import Schedule, ScheduledRate
from fuyu_e2e.training.settings.lightning_settings import check_monitors, check_trainer, monitor_of
from fuyu_e2e.training.step import Guard, PendingStep, StepFigures, StepSums, judge_step, queues
from fuyu_e2e.training.tensorboard import leave_out_later


class FuyuModule(pl.LightningModule):
    """Trains a decoder on packed batches.

    The loss of a step is the sum over its supervised tokens divided by their number, over all micro-batches and
    ranks: a mean of the micro-batches' means would weigh tokens unequally.

    Args:
        decoder: The decoder's configuration, or a named size (`1m` to `8b`) with the tokenizer's vocabulary.
        optimizer: The optimizer and its rates.
        schedule: The learning rate over the run.
        max_new_tokens: Most tokens generated for a document in `predict` and in sample generations.
        routing: Mixture-of-Depths for a decoder that sets none itself, so that a named size can have it too.
        weights: Initial weights instead of random ones: a checkpoint, a run's directory or an exported folder with
            the same decoder and tokenizer.
        z_loss: Weight of the z-loss, which keeps the logits from drifting; PaLM's is 1e-4. Logged losses exclude it.
        activation_checkpointing: What the backward pass recomputes instead of keeping it: `none`, all but products
            and attention (`selective`), or whole blocks (`full`), for the least memory and the time of one more
            forward pass.
        compile: Whether to compile blocks, once for all batches; takes a minute or more and pays off on GPUs.
        attention: The attention backend: `documents` anywhere, `varlen`, `flash` or `flex` on CUDA devices; `auto`
            takes the fastest available.
        fp8: Whether blocks multiply in 8-bit floating point, on GPUs that support it; best with `trainer.precision`
            bf16-mixed and `compile`. Not under tensor parallelism.

    Raises:
        UserError: Settings contradict each other, or one is out of its range.
    """

    def __init__(
        self,
        decoder: FuyuConfig | SizeName,
        optimizer: OptimizerConfig = OptimizerConfig(),
        schedule: Schedule = Schedule(),
        max_new_tokens: int = 64,
        routing: RoutingConfig | None = None,
        weights: str | None = None,
        z_loss: float = 0.0,
        activation_checkpointing: ActivationCheckpointing = "none",
        compile: bool = False,
        attention: AttentionBackend = "auto",
        fp8: bool = False,
    ) -> None:
        super().__init__()
        self.config = decoder if isinstance(decoder, FuyuConfig) else named_size(decoder)
        self._named_size = not isinstance(decoder, FuyuConfig)
        if routing is not None:
            if self.config.routing is not None:
                raise UserError("Both model.routing and model.decoder.routing are set: leave one of them out.")
            self.config = replace(self.config, routing=routing)
        if not z_loss >= 0:
            raise UserError(f"model.z_loss is {z_loss}, but must be 0 or above.")
        if max_new_tokens < 1:
            raise UserError(f"model.max_new_tokens is {max_new_tokens}, but must be at least 1.")
        self.z_loss = z_loss
        self.activation_checkpointing: ActivationCheckpointing = activation_checkpointing
        self.compiles = compile
        self.attention: AttentionBackend = attention
        self.fp8 = fp8
        self.optimizer_config = optimizer
        self.schedule = schedule
        self.max_new_tokens = max_new_tokens
        self.weights = weights
        self.tokens_seen = 0
        """Tokens of documents in all steps so far, skipped ones included, over all ranks; padding doesn't count."""
        self._validated_at = -1
        """The step of the last validation."""
        self._loaded_figures: dict[str, float] = {}
        """The validation figures of the loaded checkpoint, if they were taken at its step."""
        self.validation, self.testing = evaluation_metrics(), evaluation_metrics()
        self.row: Row | None = None
        """The row of the last batch, with its blocks' reports."""
        self.votes: dict[str, bool] = {}
        """Messages of this rank's callbacks to the other ranks in each step, with the same names on all ranks.
        Callbacks set them in `on_before_optimizer_step`; all ranks receive them in the same step (`figures.votes`)."""
        self.beside: dict[str, Tensor] = {}
        """Scalars on the device that this rank's callbacks want on the host, read with the figures of the step
        (`figures.beside`). Callbacks set them in `on_before_optimizer_step`, for one step."""
        self.guard: Guard | None = None
        """Decides which steps are bad; without one, no step is skipped."""
        self.figures: StepFigures | None = None
        """Figures of the last step of this start that was read: on a GPU, usually the one before the last
        completed."""
        self._monitored = False
        """Whether a callback decides by figures of training steps."""
        self._sums = StepSums()
        self._pending: PendingStep | None = None
        self._gradient_norm: Tensor

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *_: Any, **__: Any) -> NoReturn:
        """Refuses: Lightning would build the module from hyperparameters, which no checkpoint here stores.

        Raises:
            UserError: Always; names what reads a checkpoint.
        """
        raise UserError(
            f"{cls.__name__}.load_from_checkpoint reads no checkpoint of fuyu-e2e: the model and its processor are "
            f"fuyu_e2e.load({str(checkpoint_path)!r}), and trainer.fit(..., ckpt_path=...) goes on with training."
        )

    @property
    def datamodule(self) -> FuyuDataModule:
        """The data module of the run that this module is attached to.

        Raises:
            UserError: The trainer was given loaders, or another data module.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, FuyuDataModule):
            raise UserError(
                "FuyuModule takes its tokenizer and its packed rows from a FuyuDataModule: call "
                "trainer.fit(module, FuyuDataModule(...)), without loaders."
            )
        return data

    @property
    def metadata(self) -> ModelMetadata:
        """The description that a checkpoint of this run carries."""
        return ModelMetadata(self.config, self.datamodule.tokenizer, self.datamodule.images)

    def setup(self, stage: str) -> None:
        """Checks what the settings alone don't show.

        Raises:
            UserError: A setting of the trainer doesn't work here; the tokenizer or the image layout doesn't fit the
                decoder; an image may be larger than the window through which its tokens are to see each other; `fit`
                has no end; or `predict` has several processes.
        """
        check_trainer(self.trainer)
        if stage == "fit":
            check_monitors(self.trainer)
        if stage == "predict" and self.trainer.world_size > 1:
            raise UserError(
                "predict runs in one process, and continues the checkpoints of any strategy: say --trainer.devices 1 "
                "--trainer.strategy auto."
            )
        self.fit_vocabulary(self.datamodule)
        if not same_layout(self.datamodule.layout, self.config.connector):
            raise UserError(
                "FuyuDataModule lays images out in another way than the decoder's connector reads them: give it "
                "layout=config.connector."
            )
        if stage == "fit":
            tokens = most_tokens(self.datamodule.layout, self.datamodule.images)
            for mask in self.config.block_masks:
                mask.check_images(tokens)
        if stage == "fit" and self.trainer.max_steps < 1:
            raise UserError(
                f"trainer.max_steps is {self.trainer.max_steps}, not a number of steps: training data is an endless "
                "stream and the learning rate follows the steps, so say how many there are."
            )

    def fit_vocabulary(self, data: FuyuDataModule) -> None:
        """Sets the vocabulary of a named size to the data's tokenizer; leaves other decoders as they are.

        Called before the decoder is built: by `setup`, and by commands that read a run without starting it.

        Raises:
            UserError: The configured vocabulary of another decoder differs from the tokenizer's; or the tokenizer
                can't be read.
        """
        vocabulary = data.tokenizer.vocab_size
        if vocabulary == self.config.vocab_size:
            return
        if not self._named_size:
            made_for = self.config.vocab_size
            raise UserError(
                f"{data.tokenizer_path} has {vocabulary} tokens, but the decoder is made for {made_for}: a run that "
                "goes on needs the tokenizer that it began with; for a new one set model.decoder.vocab_size to "
                f"{vocabulary}, or train a tokenizer with --vocab-size {made_for}."
            )
        self.config = replace(self.config, vocab_size=vocabulary)

    def configure_model(self) -> None:
        """Builds the decoder; in this hook, so that a strategy can shard it.

        Raises:
            UserError: Sharded weights are to be averaged, or the device has no float8 products.
        """
        if not hasattr(self, "decoder"):
            # Strategies differ in the device that they have weights made on. GPUs draw others than CPUs, and than GPUs
            # of another size; a seed means the same weights everywhere, and the strategy moves them.
            with torch.device("cpu"):
                self.decoder = Decoder(self.config)
            self.decoder.recompute(self.activation_checkpointing)
            self.decoder.attention = self.attention
            # Each rank counts the scores of its own rows; DDP would overwrite them with those of the first.
            counts = [name for name, _ in self.named_buffers() if name.endswith(".rule.counts")]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, counts)
            if self.fp8:
                if self.device_mesh is not None and self.device_mesh[TENSOR].size() > 1:
                    raise UserError("model.fp8 doesn't work under tensor parallelism: say --trainer.strategy fsdp2.")
                use_float8(self.decoder, self.trainer.strategy.root_device)
            if self.compiles:
                for block in self.decoder.blocks:
                    block.compile()
            if self.device_mesh is not None:
                callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
                if any(isinstance(callback, WeightAveraging) for callback in callbacks):
                    raise UserError(
                        "Lightning averages weights (EMA) in a copy of the model, which can't be made where they are "
                        "in parts over processes: leave that callback out, or say --trainer.strategy ddp."
                    )
                shard(self.decoder, self.device_mesh)

    def on_fit_start(self) -> None:
        """Loads the initial weights, unless the run resumes from a checkpoint, which is loaded already.

        Raises:
            UserError: The weights can't be read, or belong to another decoder or tokenizer.
        """
        self.guard = None  # an earlier run's
        if self.weights is not None and self.trainer.ckpt_path is None:
            stored = read_model(self.weights)
            self.metadata.check_same(stored.metadata, self.weights)
            load_weights(self.decoder, stored.weights)

    def on_train_start(self) -> None:
        """Continues the curves at the run's step, and drops state of an earlier run of this module."""
        leave_out_later(self.trainer)
        monitors = map(monitor_of, self.trainer.callbacks)  # type: ignore[attr-defined]
        self._monitored = any(monitor is not None and monitor.startswith("train/") for monitor in monitors)
        self._sums.clear()
        self.votes, self.beside = {}, {}
        self.figures = self._pending = None

    def configure_optimizers(self) -> Any:
        """Returns the optimizer, and the schedule over `trainer.max_steps`."""
        optimizer = build_optimizer(self.decoder, self.optimizer_config)
        scheduler = ScheduledRate(optimizer, self.schedule, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_start(self, batch: PackedBatch, batch_idx: int) -> None:
        """Makes loggers count optimizer steps."""
        count_steps(self.trainer)

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Returns the summed loss of one micro-batch; the gradient is divided by the step's supervised tokens
        later."""
        self.decoder.progress = self._progress_after(0)
        self.row = self.decoder.row(batch)
        loss, z_loss = self.decoder.loss_and_z(batch, self.row, with_z=self.z_loss > 0)
        self.decoder.observe(self.row)
        self._sums.add(loss, batch)
        beside = self.z_loss * z_loss + self.row.auxiliary * batch.targets.numel()
        # Undoes the division by the number of micro-batches that Lightning is about to do.
        return (loss + beside) * self.trainer.accumulate_grad_batches

    def _progress_after(self, steps: int) -> TrainingProgress:
        step = self.trainer.global_step + steps
        return TrainingProgress(step, step / self.trainer.max_steps)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradient by the supervised tokens of the whole step, and disables the update of a bad step.

        A skipped step still counts for the data, the learning rate and `global_step`. The host reads the figures of
        the step before, and those of this step only if they are shown.
        """
        self.read_step()
        assert isinstance(optimizer, MuonAdamW)
        weights, ranks, replicas = weights_of(optimizer), self.trainer.world_size, DataRank.of(self.trainer).replicas
        sums = self._sums.over_ranks(squared_norm_part(weights, ranks), self.votes)
        self._sums.clear()
        judged = judge_step(sums, ranks, None if self.guard is None else self.guard.limits())
        scale_gradients(weights, judged.factor.float())
        self._gradient_norm = judged.norm.float()
        if self.guard is not None:
            optimizer.found_inf = judged.bad.float()
        self.decoder.end_step(
            self._progress_after(1), lambda counts: sum_over_ranks(counts) // replicas, skip=judged.bad
        )
        step = self.trainer.global_step + 1
        self._pending = PendingStep(step, sums, judged, votes=self.votes, beside=self.beside, replicas=replicas)
        self.beside = {}
        shown = step % steps_between_logs(self.trainer) == 0 or step == self.trainer.max_steps or self.figures is None
        if shown or self._monitored or not queues(self.device):
            self.read_step()
        assert self.figures is not None
        self.log("train/loss", self.figures.loss, prog_bar=True)
        if step % steps_between_logs(self.trainer) == 0:
            self._log_step(self.figures, optimizer)

    def read_step(self) -> None:
        """Reads the figures of the last step, if that is still to do; all ranks call it at the same point.

        Raises:
            UserError: The guard ends the run.
        """
        if self._pending is None:
            return
        self.figures, self._pending = self._pending.read(), None
        self.tokens_seen += self.figures.tokens
        if self.guard is not None:
            self.guard.judge(self.figures)

    def on_train_end(self) -> None:
        """Reads the last step of a run that ends before `trainer.max_steps`."""
        self.read_step()

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """Logs as Lightning does, but keeps a number on the host: Lightning copies it to the device and reads it back.

        A number to be reduced over ranks goes to the device, since GPUs reduce what lies on them.
        """
        stays = isinstance(value, float) and not options.get("sync_dist", False)
        super().log(name, torch.tensor(value) if stays else value, *args, **options)

    def _log_step(self, figures: StepFigures, optimizer: torch.optim.Optimizer) -> None:
        """Logs the figures of a step; only if they are written, since each one costs Lightning time."""
        self.log("train/perplexity", torch.tensor(figures.loss).exp())
        self.log("train/gradient_norm", figures.gradient_norm)
        self.log("tokens", float(self.tokens_seen))
        for group in optimizer.param_groups:
            self.log(f"lr/{group['kind']}", group["lr"])

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the norm over all weights or each entry by value; 0 clips nothing, as in Lightning."""
        if gradient_clip_val and gradient_clip_algorithm == "value":
            clamp_gradients(weights_of(optimizer), gradient_clip_val)
        elif gradient_clip_val:
            # As in torch's clip_grad_norm_, which knows nothing of several meshes.
            factor = (gradient_clip_val / (self._gradient_norm + 1e-6)).clamp(max=1.0)
            scale_gradients(weights_of(optimizer), factor)

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Adds a batch to the validation loss."""
        self._evaluate(batch, self.validation, "val")

    def on_validation_epoch_end(self) -> None:
        """Records the step that the validation figures belong to."""
        if not self.trainer.sanity_checking:
            self._validated_at, self._loaded_figures = self.trainer.global_step, {}

    @property
    def validated(self) -> dict[str, float]:
        """The validation figures of the current weights, by their names in TensorBoard; empty if there are none."""
        if self._validated_at != self.trainer.global_step:
            return {}
        known = {name: value for name, value in self.trainer.callback_metrics.items() if name.startswith("val/")}
        return self._loaded_figures or {name: float(value) for name, value in known.items()}

    def test_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Adds a batch to the test loss."""
        self._evaluate(batch, self.testing, "test")

    def _evaluate(self, batch: PackedBatch, metrics: torch.nn.ModuleDict, stage: str) -> None:
        self.row = self.decoder.row(batch)
        sums = evaluation_sums(self.decoder.score_tokens(batch, self.row), batch)
        for name, metric in metrics.items():
            assert isinstance(metric, Mean)
            metric.update(*sums[name])
            self.log(f"{stage}/{name}", metric, on_epoch=True, batch_size=1, prog_bar=name == "loss")

    def predict_step(self, batch: list[Prompt], batch_idx: int) -> list[dict[str, str]]:
        """Continues each prompt; returns its key, the true continuation and the generated one."""
        texts = self.continue_prompts(batch, self.decoder)
        return [
            {"key": prompt.document.key, "truth": prompt.truth, "generated": text}
            for prompt, text in zip(batch, texts, strict=True)
        ]

    def continue_prompts(self, prompts: list[Prompt], decoder: Decoder) -> list[str]:
        """Returns the greedy continuation of each prompt, as text."""
        return continue_texts(decoder, self.datamodule.tokenizer, prompts, max_new_tokens=self.max_new_tokens)

    def whole_decoder(self) -> Decoder | None:
        """Returns, on the first process, a decoder that works alone: a gathered copy if the weights are sharded.

        Returns None on the other processes; all must call it.
        """
        if self.device_mesh is None:
            return self.decoder if self.trainer.is_global_zero else None
        every = gather_weights(self.decoder)
        weights = {name: tensor.cpu() for name, tensor in every if self.trainer.is_global_zero}
        return build_decoder(self.config, weights, self.device) if self.trainer.is_global_zero else None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the description of the model, the data and the training."""
        self.read_step()
        checkpoints = checkpoints_of(self.trainer)
        checkpoint[SECTION] = self.metadata.section() | {
            "tokens_seen": self.tokens_seen,
            "training": training_settings(self.optimizer_config, self.schedule, self.trainer),
            "data": {source.name: source.digest for source in self.datamodule.stream_sources("train")},
            "documents": self.datamodule.document_kinds(),
            "validation": self.validated,
            "monitored": checkpoints.monitored(self.trainer) if checkpoints is not None else None,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another configuration before anything of it is used, and sets the position to resume
        at.

        Raises:
            UserError: The checkpoint differs, or its rows don't divide into steps of this run.
        """
        source = str(self.trainer.ckpt_path or "The checkpoint")
        self.metadata.check_same(ModelMetadata.of(checkpoint, source), source)
        self.tokens_seen = checkpoint[SECTION]["tokens_seen"]
        self._validated_at = checkpoint["global_step"]
        self._loaded_figures = checkpoint[SECTION].get("validation", {})
        if self.trainer.state.fn == TrainerFn.FITTING:
            restore(checkpoint, self.optimizer_config, self.schedule, self.trainer, source)
