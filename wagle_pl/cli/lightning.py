"""Commands that train and test: LightningCLI with this package's classes by short name; studies."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import lightning as L
import yaml
from lightning.fabric.utilities.seed import max_seed_value, min_seed_value
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

import wagle_pl.data
import wagle_pl.unlearning  # noqa: F401  the imports make the classes known by their short names
from wagle_pl.attribution import AttributionModule
from wagle_pl.cli.callbacks import EpochCheckpoint, StopAtSignal
from wagle_pl.cli.parser import OneLineErrors, classes_first
from wagle_pl.core.environment import prepare_libraries, trainer_errors
from wagle_pl.core.errors import WagleError
from wagle_pl.evaluation import Evaluate, EvaluationModule
from wagle_pl.lm.module import LanguageModule
from wagle_pl.strategies import is_zero, load_plain
from wagle_pl.study import Plants, Study

#: Class of ``--optimizer.OPTION`` where none is named: the default of the modules.
DEFAULT_OPTIMIZER = "MaskedAdamW"

EXIT_INTERRUPTED = 130  # as shells have it: 128 + SIGINT

#: Values of ``--ckpt_path`` that Lightning resolves itself.
_NO_PATHS = ("best", "last", "hpc", "registry")


class WagleArgumentParser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser with one-line errors."""


class WagleCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` over any LightningModule and DataModule."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_class=WagleArgumentParser,
            parser_kwargs={"prog": "wagle"},
            auto_configure_optimizers=False,  # the modules make theirs, of what is given here
            **kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """``--optimizer`` and ``--lr_scheduler``, any of torch's or of the package's."""
        parser.add_optimizer_args()
        parser.add_lr_scheduler_args()

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        """Parse; a class may come after its options, and an optimiser's options without its class.

        Raises:
            WagleError: if the seed is none of torch's.
        """
        classes = {name.removesuffix(".help") for name in parser.options if name.endswith(".help")}
        args = classes_first(args, classes)
        named = any(argument.partition("=")[0] == "--optimizer" for argument in args)
        if not named and any(argument.startswith("--optimizer.") for argument in args):
            args[1:1] = ["--optimizer", DEFAULT_OPTIMIZER]  # a configuration's comes later and wins
        super().parse_arguments(parser, args)
        options = self._options(self.config)
        options.pop("config", None)  # what was in the files is in the options
        seed = options.get("seed_everything")
        if not min_seed_value <= int(seed) <= max_seed_value:
            raise WagleError(
                f"must be in [{min_seed_value}, {max_seed_value}], got {seed}", "seed_everything"
            )

    def _parse_ckpt_path(self) -> None:
        """Read no options from a checkpoint: it brings weights and progress.

        Private to LightningCLI, which has no switch for it and would load the whole file.
        """

    def _options(self, config: Any) -> Any:
        return config[config["subcommand"]]

    def instantiate_classes(self) -> None:
        """Instantiate; the module gets the run's configuration and makers of its optimiser."""
        super().instantiate_classes()
        dumped = yaml.safe_load(self.parser.dump(self.config, skip_link_targets=False))
        options = dumped[self.config["subcommand"]]
        self.model.run_config = {
            k: v for k, v in options.items() if v is not None and k != "config"
        }
        for option in ("optimizer", "lr_scheduler"):
            init = self._options(self.config_init).get(option)
            if init and hasattr(self.model, f"make_{option}"):
                setattr(self.model, f"make_{option}", _maker(init.as_dict()))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The Trainer of the options, with the callbacks that every run has.

        Raises:
            WagleError: if Lightning refuses an option.
        """
        options = self._options(self.config_init).get("trainer") or {}
        if options.get("max_epochs") is None and isinstance(self.model, AttributionModule):
            kwargs.setdefault("max_epochs", -1)  # the module ends after one pass by itself
        callbacks = options.get("callbacks") or []
        callbacks = [*callbacks] if isinstance(callbacks, list) else [callbacks]
        keeps = any(isinstance(callback, Checkpoint) for callback in callbacks)
        if options.get("enable_checkpointing") is not False and not keeps:
            callbacks.append(EpochCheckpoint())  # in place of Lightning's own default
        trains = isinstance(self.model, LanguageModule)
        trains = trains and not isinstance(self.model, EvaluationModule)  # which brings its own
        if trains and not any(isinstance(callback, Evaluate) for callback in callbacks):
            callbacks.insert(0, Evaluate())
        kwargs.setdefault("callbacks", callbacks)
        with trainer_errors():
            trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.append(StopAtSignal())  # last: others keep the step that is done
        return trainer

    def _check_checkpoint(self) -> None:
        """Check the checkpoint to start from before the Trainer reads it.

        Raises:
            WagleError: if it does not exist, is damaged or runs code, or needs another strategy.
        """
        options = self._options(self.config)
        given = str(options.get("ckpt_path") or "")
        if not given or "://" in given or given.partition(":")[0] in _NO_PATHS:
            return
        path = Path(given)
        if not path.exists():
            raise WagleError(
                f"checkpoint {given} does not exist: give --ckpt_path a file or folder that a run "
                "wrote"
            )
        if path.is_file() and options.get("weights_only") is not False:
            load_plain(path)
        if path.is_dir() and not is_zero(self.trainer.strategy):
            raise WagleError(
                f"checkpoint {given} was written under DeepSpeed: add --trainer.strategy "
                "deepspeed_stage_2 (any stage and number of devices will do), or turn it into a "
                "model with wagle export"
            )

    before_fit = before_validate = before_test = before_predict = _check_checkpoint


def _maker(init: dict[str, Any]) -> Callable[..., Any]:
    """What makes an object of a class path and options, its first argument given later."""
    cls = resolve_name(init["class_path"])
    first = next(iter(inspect.signature(cls).parameters))  # DeepSpeed's is not called params
    options = {k: v for k, v in (init.get("init_args") or {}).items() if k != first}
    return partial(cls, **options)


def study(**options: Any) -> None:
    """Run what of the grid is not finished yet, then print and write what was found.

    Args:
        **options: passed to :class:`Study`.
    """
    prepare_libraries()
    try:
        Study(**options).run()
    except KeyboardInterrupt:  # it has said what is left to do
        raise SystemExit(EXIT_INTERRUPTED) from None


def plant(**options: Any) -> None:
    """Plant what is not planted yet, then write which scores find it.

    Args:
        **options: passed to :class:`Plants`.
    """
    prepare_libraries()
    Plants(**options).run()
