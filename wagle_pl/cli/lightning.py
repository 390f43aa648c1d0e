"""Commands that train and test: LightningCLI with short class names, stopping at a signal, and
checkpoints of long runs."""

from __future__ import annotations

import inspect
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Optional

import lightning as L
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import max_seed_value, min_seed_value
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import SLURMEnvironment

import wagle_pl.data
import wagle_pl.unlearning  # noqa: F401  the imports make the classes known by their short names
from wagle_pl.attribution import AttributionModule
from wagle_pl.cli.parser import OneLineErrors, classes_first
from wagle_pl.core import distributed
from wagle_pl.core.environment import trainer_errors
from wagle_pl.core.errors import WagleError, causes, first_line
from wagle_pl.core.files import absent, check_writable
from wagle_pl.core.registry import import_further
from wagle_pl.core.schema import check
from wagle_pl.core.stopping import SIGNALS, Stopped, install, say
from wagle_pl.core.tensorfiles import load_plain
from wagle_pl.evaluation import Evaluate, EvaluationModule
from wagle_pl.lm.module import LanguageModule
from wagle_pl.lm.resume import check_lightning
from wagle_pl.strategies import is_zero

log = logging.getLogger(__name__)

#: Class for ``--optimizer.OPTION`` without ``--optimizer``: the default of the modules.
DEFAULT_OPTIMIZER = "MaskedAdamW"

#: Values of ``--ckpt_path`` that Lightning resolves itself.
_NO_PATHS = ("last", "hpc", "registry")


class WagleArgumentParser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser with one-line errors."""


class WagleCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` over any LightningModule and DataModule.

    A subclass can add arguments and links as for LightningCLI; ``wagle_pl.cli.app.main(cli=Mine)``
    runs it as the command ``wagle``, with configurations by name and errors of one line.

    Args:
        args: the command and its options; those of the process when None.
        **options: of LightningCLI, in place of those set here.
    """

    def __init__(self, args: Optional[Sequence[str]] = None, **options: Any) -> None:
        _check_launcher()
        import_further("LightningDataModule")
        args = [*(sys.argv[1:] if args is None else args)]
        commands = self.subcommands()
        if args[:1] and args[0] in commands:  # no parser is built for the others
            self.subcommands = lambda: {args[0]: commands[args[0]]}  # type: ignore[method-assign]
        fixed = {
            "model_class": L.LightningModule,
            "datamodule_class": L.LightningDataModule,
            "subclass_mode_model": True,
            "subclass_mode_data": True,
            "save_config_kwargs": {"overwrite": True},
            "seed_everything_default": 0,
            "parser_class": WagleArgumentParser,
            "parser_kwargs": {"prog": "wagle"},
            "auto_configure_optimizers": False,  # the modules make theirs, from what is given here
        }
        super().__init__(**{**fixed, **options}, args=args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--optimizer`` and ``--lr_scheduler``: any class of torch or of this package."""
        parser.add_optimizer_args()
        parser.add_lr_scheduler_args()
        for action in parser._actions:  # an empty mask file must not be read as the value null
            if kwargs := getattr(action, "sub_add_kwargs", None):
                action.sub_add_kwargs = {**kwargs, "sub_configs": False}

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        """Parse; a class may follow its options, and ``--optimizer`` may be left out."""
        classes = {name.removesuffix(".help") for name in parser.options if name.endswith(".help")}
        args = classes_first(args, classes)
        named = any(argument.partition("=")[0] == "--optimizer" for argument in args)
        if not named and any(argument.startswith("--optimizer.") for argument in args):
            args[1:1] = ["--optimizer", DEFAULT_OPTIMIZER]  # a configuration's comes later and wins
        super().parse_arguments(parser, args)
        options = self.config[self.config["subcommand"]]
        options.pop("config", None)  # what was in the files is in the options
        for name, value in options.as_dict().items():
            _check_integers(value, name)
        if not min_seed_value <= (seed := int(options.get("seed_everything"))) <= max_seed_value:
            range_error = f"must be in [{min_seed_value}, {max_seed_value}], got {seed}"
            raise WagleError(range_error, "seed_everything")

    def _parse_ckpt_path(self) -> None:
        """Read no options from a checkpoint. (Private to Lightning, which would load all of it.)"""

    def instantiate_classes(self) -> None:
        """Instantiate; give the module the run's configuration, and functions for its optimiser."""
        try:
            super().instantiate_classes()
        except (ImportError, ValueError) as error:  # a class whose package is not installed
            missing = next((c for c in causes(error) if isinstance(c, ImportError)), None)
            if missing is None:
                raise
            raise WagleError(first_line(missing)) from error
        dumped = yaml.safe_load(self.parser.dump(self.config, skip_link_targets=False))
        options = dumped[self.subcommand]
        self.model.run_config = {k: v for k, v in options.items() if v is not None}
        for option in ("optimizer", "lr_scheduler"):
            init = self.config_init[self.subcommand].get(option)
            if init and hasattr(self.model, f"make_{option}"):
                cls = resolve_name(init["class_path"])
                init_args = init.as_dict().get("init_args") or {}
                first = next(iter(inspect.signature(cls).parameters))  # DeepSpeed: not "params"
                options = {k: v for k, v in init_args.items() if k != first}  # it is given later
                setattr(self.model, f"make_{option}", partial(cls, **options))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The configured Trainer, with the callbacks that every run has."""
        options = self.config_init[self.subcommand].get("trainer") or {}
        if options.get("max_epochs") is None and isinstance(self.model, AttributionModule):
            kwargs.setdefault("max_epochs", -1)  # the module itself ends after one pass
        callbacks = options.get("callbacks") or []
        callbacks = [*callbacks] if isinstance(callbacks, list) else [callbacks]
        keeps = any(isinstance(callback, Checkpoint) for callback in callbacks)
        if options.get("enable_checkpointing") is not False and not keeps:
            callbacks.append(EpochCheckpoint())  # in place of Lightning's own default
        tests = isinstance(self.model, LanguageModule)
        tests = tests and not isinstance(self.model, EvaluationModule)  # which brings its own
        if tests and not any(isinstance(callback, Evaluate) for callback in callbacks):
            callbacks.insert(0, Evaluate())
        kwargs.setdefault("callbacks", callbacks)
        most, devices = max(8, os.cpu_count() or 1), str(options.get("devices"))
        if devices.isdecimal() and int(devices) > most:  # each is a process
            raise WagleError(f"must be at most {most} here, got {devices}", "trainer.devices")
        for name in ("val_check_interval", "check_val_every_n_epoch"):
            if options.get(name) == 0:
                raise WagleError("must be above 0", f"trainer.{name}")
        for name in ("max_steps", "max_epochs"):
            if (options.get(name) or 0) > 10**9:  # which would not end in a lifetime
                raise WagleError(f"must be at most {10**9:,}", f"trainer.{name}")
        if "spawn" in str(options.get("strategy")):
            hint = "choose ddp, which starts the command once for each device"
            raise WagleError("a command cannot be spawned", "trainer.strategy", hint)
        with trainer_errors():
            trainer = super().instantiate_trainer(**kwargs)
        if "://" not in (root := str(trainer.default_root_dir)):
            check_writable(Path(root), "files", "trainer.default_root_dir")
        trainer.callbacks.append(StopAtSignal())  # last: others save the finished step first
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Run; options that Lightning can check only then are mistakes of the user's."""
        self._check_environment()
        try:
            super()._run_subcommand(subcommand)
        except MisconfigurationException as error:
            raise WagleError(f"trainer: {first_line(error)}") from error
        except RuntimeError as error:
            if not str(error).startswith("Early stopping conditioned on metric"):
                raise
            raise WagleError(first_line(error), "trainer.callbacks.monitor") from None

    def _check_environment(self) -> None:
        """Refuse what a launcher has not, or wrongly, told several ranks of each other."""
        trainer = self.trainer
        # private to Lightning, as in StopAtSignal
        environment = trainer._accelerator_connector.cluster_environment
        if trainer.strategy.launcher is None or environment is None:
            return
        if trainer.num_nodes > 1 and not {"MASTER_ADDR", "SLURM_NTASKS"} & {*os.environ}:
            hint = "start with torchrun or srun on each machine"
            raise WagleError("MASTER_ADDR names no first machine", "trainer.num_nodes", hint)
        with trainer_errors():
            for name in ("local_rank", "node_rank", "global_rank", "world_size"):
                getattr(environment, name)()
            _ = environment.main_address, environment.main_port
            environment.validate_settings(trainer.num_devices, trainer.num_nodes)

    def _check_checkpoint(self) -> None:
        """Refuse a checkpoint that cannot be read, before the Trainer tries to resume from it."""
        options = self.config[self.subcommand]
        name = str(options.get("ckpt_path") or "")
        if name == "best" or options.get("ckpt_path") == "":
            raise WagleError("no checkpoint is the best before a run: name a file", "ckpt_path")
        if name == "hpc" and not [*Path(self.trainer.default_root_dir).glob("hpc_ckpt_*")]:
            raise WagleError("no job of a cluster has left a checkpoint: name a file", "ckpt_path")
        if name.partition(":")[0] == "registry" and find_spec("litmodels") is None:
            raise WagleError("a registry of models needs the package litmodels", "ckpt_path")
        if not name or "://" in name or name.partition(":")[0] in _NO_PATHS:
            return
        if not (path := Path(name)).is_file() and not path.is_dir():
            raise absent("checkpoint", name)
        if path.is_file() and options.get("weights_only") is not False:
            check_lightning(load_plain(path, f"checkpoint {path}"), f"checkpoint {path}")
        if path.is_dir() and not is_zero(self.trainer.strategy):
            raise WagleError(
                f"checkpoint {name} was written under DeepSpeed: add --trainer.strategy "
                "deepspeed_stage_2 (any stage and number of devices works), or turn it into a "
                "model with wagle export"
            )

    before_fit = before_validate = before_test = before_predict = _check_checkpoint


def _check_integers(value: Any, option: str) -> None:
    """Refuse integers of more than 64 bits."""
    if isinstance(value, dict):
        for name, part in value.items():
            _check_integers(part, option if name == "init_args" else f"{option}.{name}")
    elif isinstance(value, list):
        for part in value:
            _check_integers(part, option)
    elif type(value) is int:
        check(value, int, option)


def _check_launcher() -> None:
    """Refuse ranks, as launchers give them, that are no numbers."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
        if not (value := os.environ.get(name, "0")).isdecimal():
            message = f"the environment variable {name} must be an integer, got {value!r}"
            raise WagleError(message, hint="unset it, or start with torchrun or srun")


# -- callbacks of every run -----------------------------------------------------------------------


class StopAtSignal(L.Callback):
    """At SIGTERM or SIGINT: finish the step, write a checkpoint, say how to resume, exit.

    The exit code is 143 or 130. All ranks stop after the same step, no matter which of them got the
    signal. A second SIGINT ends the process at once, without a checkpoint. A signal that arrives
    while the result is being written is ignored.

    Under SLURM, where Lightning requeues a job at SIGUSR1, the checkpoint has the name under which
    Lightning finds it when the job restarts, so no ``--ckpt_path`` is needed.
    """

    def __init__(self) -> None:
        self._outer: dict[int, Any] = {}  # handlers to restore
        self._requeue: Optional[int] = None  # SLURM's signal
        self._asked = 0  # index in _signals of the received signal
        self._since = 0.0
        self._writing = False

    @property
    def _signals(self) -> tuple[Optional[int], ...]:
        """Signals to stop at; if ranks got different ones, the last of this list counts."""
        return (None, *SIGNALS, self._requeue)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remember the handlers before Lightning sets its own."""
        # private to Lightning: a strategy of one device does not say in which environment it runs
        environment = trainer._accelerator_connector.cluster_environment
        requeues = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
        self._requeue = environment.requeue_signal if requeues else None
        handlers = {signum: signal.getsignal(signum) for signum in self._signals if signum}
        self._outer = {signum: old for signum, old in handlers.items() if old is not None}
        self._asked, self._writing = 0, False

    def _restore(self, *_: Any, **__: Any) -> None:
        """Drop Lightning's handlers: that of SIGTERM starts a collective during any other."""
        install(self._outer)

    on_sanity_check_start = on_test_start = on_predict_start = _restore
    teardown = on_exception = _restore

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Outside a fit, a signal ends the process at once."""
        if trainer.state.fn == "validate":
            self._restore()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the handlers: from now on there is something to save."""
        install({signum: self._ask for signum in self._signals if signum})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that the result is being written from now on."""
        self._writing = True

    def _ask(self, signum: int, frame: Any = None) -> None:
        """Handler: remember the signal; stop at once at a second SIGINT (not one sent twice)."""
        name = signal.Signals(signum).name
        if self._asked and signum == signal.SIGINT and time.monotonic() - self._since > 1:
            say(f"stopped by a second {name}, without a checkpoint")
            raise Stopped(signum)
        if not self._asked:
            self._since = time.monotonic()
            then = "the run stops after this step, with a checkpoint"
            then = "the result is being written, and the run ends then" if self._writing else then
            say(f"{name}: {then}")
        self._asked = max(self._asked, self._signals.index(signum))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stop if any rank has received a signal and the step is done."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return
        if index := distributed.all_reduce_max(self._asked):
            self._stop(trainer, self._signals[index])

    def _stop(self, trainer: L.Trainer, signum: int) -> None:
        name, step = signal.Signals(signum).name, trainer.global_step
        if trainer.fast_dev_run:
            log.warning("stopped by %s; fast_dev_run writes no checkpoint", name)
            raise Stopped(signum)
        if self._requeue is None:
            path = trainer.strategy.broadcast(self._path(trainer))
            then = f"to resume, add to the same command: --ckpt_path {path}"
        else:  # private to Lightning, which resumes from there without being told
            path = trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir)
            then = f"the same job resumes from {path} automatically"
        if self._requeue and signum == self._requeue:  # private too: it saves and requeues
            trainer._signal_connector._slurm_sigusr_handler_fn(signum, None)
        else:
            trainer.save_checkpoint(path, weights_only=False)
        log.warning("stopped by %s after step %d; %s", name, step, then)
        raise Stopped(signum)

    def _path(self, trainer: L.Trainer) -> str:
        """Path of the checkpoint, next to the run's others."""
        beside = getattr(trainer.checkpoint_callback, "dirpath", None)
        folder = Path(beside or Path(trainer.default_root_dir) / "checkpoints")
        path = folder / f"stopped-step={trainer.global_step}.ckpt"
        return os.path.relpath(path) if path.absolute().is_relative_to(Path.cwd()) else str(path)


class EpochCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint``, without checkpoints in the first minutes of a run.

    A checkpoint takes up to four times the model's disk space, and a few minutes are quickly
    repeated. Checkpoints requested with ``every_n_train_steps``, ``train_time_interval``,
    ``monitor`` or a ``save_top_k`` other than 1 are always written, and so are those at a signal.

    Args:
        after_minutes: no checkpoint is written before the run has lasted this long.
        **kwargs: passed to ``ModelCheckpoint``.
    """

    def __init__(self, after_minutes: float = 10.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        plain = self.monitor is None and self.save_top_k == 1 and bool(self.every_n_epochs)
        self.after_minutes = after_minutes if plain else 0.0
        self._started = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._started = time.monotonic()

    def _is_due(self, trainer: L.Trainer) -> bool:
        """Whether the run has lasted long enough, by rank 0's clock; a collective."""
        passed = time.monotonic() - self._started
        return trainer.strategy.broadcast(passed >= 60 * self.after_minutes)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save if it is due; likewise at the end of validation and of training."""
        if self._is_due(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_due(trainer):
            super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_due(trainer):
            super().on_train_end(trainer, pl_module)
