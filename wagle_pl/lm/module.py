"""``LanguageModule``: a causal language model in Lightning, the base of all modules here."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Optional, Protocol, Union, runtime_checkable

import lightning as L
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wagle_pl.core import distributed, outputs
from wagle_pl.core.environment import half_precision_is_slow
from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import check_writable
from wagle_pl.core.needs import Needs
from wagle_pl.core.schema import check, check_arguments
from wagle_pl.core.weights import fingerprint
from wagle_pl.lm import models
from wagle_pl.lm.inference import answer_places
from wagle_pl.lm.models import vocabulary_size
from wagle_pl.lm.resume import Fields, begin, check_restored, recount
from wagle_pl.lm.state import ModelState
from wagle_pl.strategies import is_sharded, is_zero

log = logging.getLogger(__name__)


class Evaluation(Protocol):
    """Observes test rows, as :class:`wagle_pl.evaluation.Evaluation` does."""

    def observe(self, batch: Mapping[str, Any], number: int) -> None: ...


@runtime_checkable
class StreamData(Protocol):
    """What a module needs from its data module, see :class:`wagle_pl.data.ForgetRetainDataModule`,
    and from its loader, see :mod:`wagle_pl.lm.resume`."""

    needs: Needs

    def stream_loader(
        self, stream: str, batch_size: Optional[int] = None, shared: bool = False
    ) -> Iterable[Mapping[str, Any]]: ...

    def train_dataloader(self) -> Any: ...

    def describe(self, stream: str) -> str: ...


class Ending(Callback):
    """Gives the model back, and releases the output, however a run ends; the last callback."""

    def __init__(self, output: Optional[Path]) -> None:
        self.output = output

    def setup(self, trainer: L.Trainer, module: LanguageModule, stage: str) -> None:
        self._handler = signal.getsignal(signal.SIGINT)

    def teardown(self, trainer: L.Trainer, module: LanguageModule, stage: str) -> None:
        module.give_back()
        if self.output:
            outputs.release(self.output)

    def on_exception(
        self, trainer: L.Trainer, module: LanguageModule, exception: BaseException
    ) -> None:
        """The same; Ctrl-C in Python stays a KeyboardInterrupt, where Lightning would exit."""
        self.teardown(trainer, module, "fit")
        alone = trainer.strategy.launcher is None
        if alone and isinstance(exception, KeyboardInterrupt) and not module.run_config:
            for logger in trainer.loggers:
                logger.finalize("failed")
            trainer._teardown()  # Lightning's, which follows
            trainer.state.stage = None
            signal.signal(signal.SIGINT, self._handler)  # which Lightning ignores from here on
            raise exception


class LanguageModule(L.LightningModule):
    """Loads a causal language model and records in checkpoints and results which model it is.

    After any end of a run (also by an exception, or Ctrl-C) ``lm`` is an ordinary model: it has the
    parameters, dtypes, devices, hooks and flags (``training``, ``requires_grad``, ``use_cache``) it
    had before, and the weights that training has reached.

    Test and validation batches go to :attr:`evaluation`, which
    :class:`wagle_pl.evaluation.Evaluate` sets; they pass through this module's steps so that the
    precision plugin and the strategy (DeepSpeed) see them.

    Args:
        model: hub id, folder in Hugging Face format or GGUF file of the model; in Python also a
            loaded Hugging Face model, whose weights are changed in place, except those of
            parameters that require no gradient.
        output: file or folder that the run writes.
        overwrite: replace an existing output.
        attn_implementation: attention kernel, by transformers' name: ``sdpa``, ``eager``,
            ``flash_attention_2``, ...; transformers' own choice when None. On a CPU ``eager``
            trains short rows faster.
    """

    #: Streams of a training batch, see :class:`wagle_pl.data.ForgetRetainDataModule`.
    streams: tuple[str, ...] = ("forget", "retain")
    #: Streams that must be the same in every epoch, because values are precomputed for their rows.
    reference_streams: tuple[str, ...] = ()
    #: Streams whose answer tokens are counted over each global batch.
    counted_streams: tuple[str, ...] = ()
    period: Optional[int] = None  # epochs after which the same batches come again; None: never

    def __init__(
        self,
        model: Union[str, PreTrainedModel],
        output: Optional[str] = None,
        overwrite: bool = False,
        attn_implementation: Optional[str] = None,
    ) -> None:
        check_arguments(LanguageModule.__init__, locals(), "model.")
        super().__init__()
        # not as a module of this one, whose checkpoints would hold it twice
        vars(self)["_given"] = model if isinstance(model, PreTrainedModel) else None
        self._home = None if self._given is None else self._given.device
        self._before: Optional[ModelState] = None
        self.model_name = str(model if self._given is None else model.config.name_or_path)
        self.output = None if output is None else str(output)
        self.overwrite = overwrite
        self.attn_implementation = attn_implementation
        self.lm: Optional[PreTrainedModel] = None
        #: Observes test and validation batches; without one they are skipped.
        self.evaluation: Optional[Evaluation] = None
        #: The whole configuration of the run, for records; the command line fills it.
        self.run_config: dict[str, Any] = {}
        self._trained = False
        self._loader_state: Optional[dict[str, Any]] = None
        self._resumed_at: Optional[int] = None  # number of steps by the checkpoint

    # -- model -------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Tell the data module what this module needs; warn if the precision is slow here.

        Raises:
            WagleError: if this is a test or a validation and nothing observes its rows; if it is a
                prediction; if a callback searches for a learning rate or a batch size.
        """
        for callback in self.trainer.callbacks:
            if isinstance(callback, (LearningRateFinder, BatchSizeFinder)):
                raise WagleError(
                    f"{type(callback).__name__} trains, tests and rewinds within a run, which ends "
                    "with the first of its trials here",
                    option="trainer.callbacks",
                    hint="leave it out, and give model.lr or data.batch_size a value",
                )
        if stage == "predict":
            raise WagleError(
                "trainer.predict has no answers to give; use trainer.test with the callback "
                "wagle_pl.Evaluate(), or generate with the attribute lm"
            )
        if stage in ("test", "validate") and self.evaluation is None:
            raise WagleError(
                f"nothing observes the rows of this {stage}",
                hint="give the Trainer the callback wagle_pl.Evaluate()",
            )
        # Lightning warns that the hook of the module is used, which is intended
        warnings.filterwarnings("ignore", "You have overridden `on_before_batch_transfer`")
        if self.output:
            check_writable(Path(self.output))
        self.trainer.callbacks.sort(key=lambda callback: isinstance(callback, Ending))
        self.serve()
        on_cpu = self.trainer.strategy.root_device.type == "cpu"
        if on_cpu and not str(self.trainer.precision).startswith(("32", "64")):
            warn_of_narrow_types(str(self.trainer.precision))

    def configure_model(self) -> None:
        """Load the model once, in the precision of the trainer."""
        if self.lm is None:
            if self._given is not None:
                self.lm = self._given
                self._before = ModelState(self.lm)
                self._before.cast(torch.get_default_dtype())
                self.lm.config.use_cache = False
            else:
                self.lm = models.load_model(
                    self.model_name,
                    sharded=self.sharded,
                    attn_implementation=self.attn_implementation,
                )
                self._before = None if self.sharded else ModelState(self.lm)
            self.model_fingerprint = self.fingerprint()

    def to(self, *args: Any, **kwargs: Any) -> LanguageModule:
        """Move the module; the model keeps the dtypes that transformers has loaded it in."""
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        for child in self.children():
            if child is not self.lm:
                child.to(*args, **kwargs)
        return self if device is None else super().to(device)

    def cpu(self) -> LanguageModule:
        """Move the module to the CPU, as Lightning does after a run, or a given model back."""
        return super().cpu() if self._home is None else self.to(self._home)

    def give_back(self) -> None:
        """Make ``lm`` what it was before the run, but for its weights. Once; repeating is safe."""
        if self._before is not None:
            self._before.restore()
        self._before = None

    @property
    def data(self) -> Optional[StreamData]:
        """The data module; None if batches come from loaders or another kind of data module."""
        data = self.trainer.datamodule if self.attached else None
        return data if isinstance(data, StreamData) else None

    def serve(self) -> None:
        """Tell the data module what this module needs."""
        if self.data is not None:
            self.data.needs = Needs(
                self.streams,
                self.reference_streams,
                self.counted_streams,
                self.period,
                vocabulary=lambda: self.vocabulary,
                tokenizer=lambda: self.tokenizer,
            )

    def fingerprint(self) -> str:
        """Fingerprint of the model as it is now. Collective: all ranks must call it."""
        return fingerprint(self.lm)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return models.load_tokenizer(self.model_name)

    @property
    def vocabulary(self) -> Optional[int]:
        """Number of token ids that the model knows; None until it is loaded."""
        return None if self.lm is None else vocabulary_size(self.lm)

    @property
    def attached(self) -> bool:
        """Whether there is a trainer; within ``load_from_checkpoint`` there is none."""
        try:
            return self.trainer is not None
        except RuntimeError:
            return False

    @property
    def fits(self) -> bool:
        """Whether the trainer is to train, rather than to validate or to test."""
        return self.attached and self.trainer.state.fn == "fit"

    @property
    def sharded(self) -> bool:
        """Whether the strategy shards the weights over ranks (ZeRO-3)."""
        return self.attached and is_sharded(self.trainer.strategy)

    @property
    def synced_gpus(self) -> bool:
        """Whether each forward pass is a collective: the weights are sharded over several ranks."""
        return self.sharded and distributed.world_size() > 1

    # -- records -----------------------------------------------------------------------------------

    @property
    def described_data(self) -> dict[str, str]:
        """Where forget and retain rows come from; empty if the data module does not say."""
        names = () if self.data is None else ("forget", "retain")
        return {name: self.data.describe(name) for name in names}

    @property
    def prompts(self) -> dict[str, Any]:
        """The texts around questions and answers, if the data module has a template: see
        :attr:`wagle_pl.data.template.Template.prompts`."""
        template = getattr(self.trainer.datamodule, "template", None)
        return {} if template is None else template.prompts

    # -- test and validation -----------------------------------------------------------------------

    @property
    def results_folder(self) -> Path:
        """Where a test writes."""
        return Path(self.trainer.default_root_dir) / "test"

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.evaluation is not None:
            self.evaluation.observe(batch, dataloader_idx)

    def predict_step(self, *_: Any) -> None:
        """There is none: :meth:`setup` says what to use."""

    validation_step = test_step

    # -- fit ---------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Note what is known of a training batch while it is on the host, see :meth:`noted`."""
        if not self.trainer.training or not isinstance(batch, Mapping):
            return batch
        return {stream: self.noted(tensors) for stream, tensors in batch.items()}

    def noted(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """One stream's tensors, and where its answers and padding are, for which its device would
        have to wait."""
        known: dict[str, Any] = {"places": answer_places(tensors["labels"])}
        if "attention_mask" in tensors:
            known["padded"] = not tensors["attention_mask"].all()
        return {**tensors, **known}

    @property
    def place(self) -> Optional[Path]:
        """What the run writes; None in Python, where it need not write."""
        return Path(self.output) if self.output else None

    def configure_callbacks(self) -> list[Callback]:
        """A callback that gives the model back, and releases the output, when the run ends."""
        return [Ending(self.place)]

    def planned_files(self) -> list[outputs.Planned]:
        """What the run is going to write, at least."""
        return []

    def on_fit_start(self) -> None:
        """Refuse to start if the disk has no room for what the run writes."""
        if self.output and not self.trainer.fast_dev_run:
            distributed.on_rank_zero(lambda: outputs.check_space(self.planned_files()))

    def on_train_start(self) -> None:
        """Continue where the checkpoint was written."""
        begin(self.trainer, self._loader_state)
        if self._resumed_at not in (None, self.global_step):
            raise WagleError(
                f"{self.checkpoint_label} says that it is of step {self._resumed_at}, and its loops "
                f"of step {self.global_step}"
            )
        self._resumed_at = None

    def on_train_end(self) -> None:
        """Note that training is over; log if nothing is written, or if a callback has ended it."""
        self._trained = True
        if self.trainer.fast_dev_run:
            log.info("fast_dev_run: this was a trial, and nothing is written")
        for callback in self.trainer.early_stopping_callbacks:
            if reason := getattr(callback, "stopping_reason_message", None):
                log.info("stopped early, after step %d: %s", self.global_step, reason.strip())

    def on_fit_end(self) -> None:
        """Write the result if the checkpoint's run was finished; refuse if nothing was trained."""
        checkpoint, trained = self.trainer.ckpt_path, self._trained
        if not trained and not checkpoint:
            raise WagleError(
                "nothing was trained, so nothing is written: trainer.max_epochs, max_steps or "
                "limit_train_batches is 0"
            )
        if not trained:
            log.info(
                "the run of checkpoint %s had come to its end: its result is written", checkpoint
            )
            self.on_train_end()
        self._trained = False

    # -- checkpoints -------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which module wrote the checkpoint."""
        checkpoint["module"] = self._kind

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not fit this run; find where the run continues."""
        self.check_kind(checkpoint)
        if self.attached and self.trainer.training:
            check_restored(checkpoint, self.trainer, self.checkpoint_label)
            self._resumed_at = checkpoint["global_step"]
            self._loader_state = recount(checkpoint, self.data)
        if not self.attached or not self.strict_loading or is_zero(self.trainer.strategy):
            return
        state = checkpoint.get("state_dict") or {}
        stored, wanted = (
            {name: tensor.shape for name, tensor in tensors.items()}
            for tensors in (state, self.state_dict())
        )
        differing = sorted(n for n in {*wanted, *stored} if wanted.get(n) != stored.get(n))
        if differing:
            raise WagleError(
                f"{self.checkpoint_label} does not hold the weights of this model: "
                f"{len(differing)} tensors are missing, or of another shape, {differing[0]} for one"
            )

    def check_kind(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse fields of wrong types, and training from a checkpoint that another module wrote."""
        check(checkpoint, Fields, self.checkpoint_label)
        kind = checkpoint.get("module")
        if self.fits and kind != self._kind:
            of = f"is of a run of {kind}" if kind else "does not say which module it is of"
            raise WagleError(
                f"{self.checkpoint_label} {of}, and this run is one of {self._kind}: give "
                "--ckpt_path another"
            )

    @property
    def checkpoint_label(self) -> str:
        """The name of the checkpoint that is loaded, in messages."""
        return f"the checkpoint {self.trainer.ckpt_path}" if self.attached else "the checkpoint"

    @property
    def _kind(self) -> str:
        """Name of the class of this package that the module is, or derives from."""
        return next(
            cls.__name__ for cls in type(self).__mro__ if cls.__module__.startswith("wagle_pl.")
        )


@cache  # once in a process: a study has hundreds of runs
def warn_of_narrow_types(precision: str) -> None:
    """Warn of a precision that is slow if this is a CPU without AVX-512."""
    if half_precision_is_slow():
        log.warning(
            "trainer.precision %s on a CPU without AVX-512 trains tens of times slower than fp32 "
            "does: give --trainer.precision 32-true",
            precision,
        )
