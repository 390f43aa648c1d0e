"""``WagleCLI``: LightningCLI with this package's classes known by short name."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any, Optional

import lightning as L
from lightning.fabric.utilities.seed import max_seed_value, min_seed_value
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import wagle_pl.data
import wagle_pl.unlearning  # noqa: F401  the imports make the classes known by their short names
from wagle_pl.attribution import AttributionModule
from wagle_pl.cli.callbacks import EpochCheckpoint, StopAtSignal
from wagle_pl.cli.commands import COMMANDS
from wagle_pl.cli.parser import OneLineErrors, classes_first
from wagle_pl.core.environment import trainer_in_the_making
from wagle_pl.core.errors import WagleError
from wagle_pl.evaluation import Evaluate, EvaluationModule
from wagle_pl.lm.module import LanguageModule
from wagle_pl.strategies import is_zero, load_plain

DESCRIPTION = (
    "Make a language model forget: fit fine-tunes, attributes or unlearns, as --model says; test measures. "
    f"Other commands, each with its own --help: {', '.join(f'wagle {name}' for name in COMMANDS)}."
)


#: Class that ``--optimizer.OPTION`` is of where no class is named: what the modules take by themselves.
DEFAULT_OPTIMIZER = "MaskedAdamW"

#: Values of ``--ckpt_path`` that are no paths.
_LIGHTNINGS_OWN = ("best", "last", "hpc", "registry")


class WagleArgumentParser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser with one-line errors."""

    def dump(self, cfg: Any, *args: Any, **kwargs: Any) -> str:
        """The configuration as YAML, to run again from anywhere: what ``base`` named is in it already."""
        cfg = cfg.clone()
        for options in (cfg, cfg.get(cfg.get("subcommand") or "")):
            if options is not None:
                options.pop("base", None)
        return super().dump(cfg, *args, **kwargs)


class WagleCLI(LightningCLI):
    """Commands ``fit``, ``validate``, ``test`` and ``predict`` over any LightningModule and LightningDataModule."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={"description": DESCRIPTION, "fit": {}},
            **kwargs,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The parser, with ``--config`` as in LightningCLI."""
        from jsonargparse import ActionConfigFile

        kwargs.setdefault("dump_header", [f"lightning.pytorch=={L.__version__}"])
        parser = WagleArgumentParser(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=ActionConfigFile,
            help="Configuration file in YAML; may be repeated.",
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The key by which a configuration names those it builds on; used before parsing."""
        parser.add_argument(
            "--base", type=Any, default=None, help="In a config file: config files it builds on."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        """Parse; a class may come after its options, and options of an optimiser may come without one."""
        classes = {
            option.removesuffix(".help") for option in parser.options if option.endswith(".help")
        }
        args = classes_first(args, classes)
        named = any(argument.partition("=")[0] == "--optimizer" for argument in args)
        if not named and any(argument.startswith("--optimizer.") for argument in args):
            args[1:1] = [
                "--optimizer",
                DEFAULT_OPTIMIZER,
            ]  # a configuration's, which comes later, takes its place
        super().parse_arguments(parser, args)

    def _set_seed(self) -> None:
        """Seed all generators.

        Raises:
            WagleError: if the seed is none.
        """
        seed = self._get(self.config, "seed_everything")
        if not min_seed_value <= int(seed) <= max_seed_value:
            raise WagleError(
                f"seed_everything must be in [{min_seed_value}, {max_seed_value}], got {seed}"
            )
        super()._set_seed()

    def _parse_ckpt_path(self) -> None:
        """The configuration stands on its own: a checkpoint brings weights and progress, no options."""

    def _add_configure_optimizers_method_to_model(self, subcommand: Optional[str]) -> None:
        """Hand ``--optimizer`` and ``--lr_scheduler`` to the module as factories: it has no weights yet."""
        for option, attribute in (
            ("optimizer", "make_optimizer"),
            ("lr_scheduler", "make_lr_scheduler"),
        ):
            init = self._get(self.config_init, option)
            if init and hasattr(self.model, attribute):
                setattr(self.model, attribute, _Factory(init))

    def _check_checkpoint(self) -> None:
        """Refuse a checkpoint that is not there, is not whole or would run code; say how one that ranks wrote is read,
        if this run cannot.

        Lightning's own words (``best``, ``last``, ``hpc``, ``registry``) and addresses of other file systems are left
        to Lightning.
        """
        path = self._get(self.config, "ckpt_path")
        if not path or "://" in str(path) or str(path).partition(":")[0] in _LIGHTNINGS_OWN:
            return
        if not Path(path).exists():
            raise WagleError(
                f"checkpoint {path} does not exist: give --ckpt_path a file or folder that a run wrote"
            )
        if (
            Path(path).is_file() and self._get(self.config, "weights_only") is not False
        ):  # the user vouches for it
            load_plain(Path(path))
        if Path(path).is_dir() and not is_zero(self.trainer.strategy):
            raise WagleError(
                f"checkpoint {path} was written under DeepSpeed: add --trainer.strategy "
                "deepspeed_stage_2 (any stage and number of devices will do), or turn it into a model "
                "with wagle export"
            )

    before_fit = before_validate = before_test = before_predict = _check_checkpoint

    def before_instantiate_classes(self) -> None:
        """Make the configuration ready for records."""
        self._dump_config()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The Trainer of the options, which a signal stops in good order; how long attribution takes is its module's
        affair if they do not say.

        Raises:
            WagleError: if Lightning refuses one of them.
        """
        options = self._get(self.config_init, "trainer", default={})
        if options.get("max_epochs") is None and isinstance(self.model, AttributionModule):
            kwargs.setdefault("max_epochs", -1)  # or Lightning would tell of a default of its own
        callbacks = options.get("callbacks") or []
        callbacks = [*callbacks] if isinstance(callbacks, list) else [callbacks]
        if options.get("enable_checkpointing") is not False and not any(
            isinstance(c, Checkpoint) for c in callbacks
        ):
            callbacks.append(EpochCheckpoint())  # in place of Lightning's own default
        if (
            isinstance(self.model, LanguageModule)
            and not isinstance(self.model, EvaluationModule)
            and not any(isinstance(c, Evaluate) for c in callbacks)
        ):
            callbacks.insert(0, Evaluate())
        kwargs.setdefault("callbacks", callbacks)
        with trainer_in_the_making():
            trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.append(
            StopAtSignal()
        )  # the last: what the others keep is of the step that is done
        return trainer

    def instantiate_classes(self) -> None:
        """Instantiate, and tell the module the run's whole configuration."""
        super().instantiate_classes()
        self.model.run_config = {
            k: v for k, v in self.config_dump.items() if v is not None and k != "config"
        }


class _Factory:
    """Makes an optimiser of parameters, or a scheduler of an optimiser, from ``class_path`` and ``init_args``."""

    def __init__(self, init: Any) -> None:
        self.init = init

    def __call__(self, target: Any, **others: Any) -> Optimizer | LRScheduler:
        init = self.init.as_dict()
        module, _, name = init["class_path"].rpartition(".")
        cls = getattr(importlib.import_module(module), name)
        first = next(iter(inspect.signature(cls).parameters))  # whatever the class calls its target
        options = {**(init.get("init_args") or {}), **others}
        return cls(target, **{k: v for k, v in options.items() if k != first})
