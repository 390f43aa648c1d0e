"""Low-rank adapters of ``peft``, a baseline: new weights are trained, and the model's stay as they
are. An untrained adapter adds zero, so the model with it still computes as at θ₀."""

from __future__ import annotations

import re
from typing import Any, Optional, Union

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wagle_pl.core.errors import WagleError, check_positive
from wagle_pl.lm.saving import model_folder


class LoRA:
    """Low-rank adapters W x + (alpha / r) B A x, through ``peft`` (arXiv 2106.09685).

    Args:
        r: rank of B A.
        alpha: the adapter's output is scaled by alpha / r.
        dropout: of the adapter's input, during training.
        target_modules: endings of names of linear layers; ``all-linear``: all but the output layer.
        merge: write a whole model, with B A in the weights; False writes a folder with only the
            adapter, which can be loaded like a model if ``peft`` is installed and the base exists.
    """

    def __init__(
        self,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        target_modules: Union[list[str], str] = "all-linear",
        merge: bool = True,
    ) -> None:
        check_positive(alpha, "adapter.alpha")
        for option, value, is_good, must in (
            ("r", r, r >= 1, "be at least 1"),
            ("dropout", dropout, 0 <= dropout < 1, "lie in [0, 1)"),
        ):
            if not is_good:
                raise WagleError(f"must {must}, got {value}", option=f"adapter.{option}")
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.target_modules, self.merge = target_modules, merge
        self._peft: Any = None

    def add(self, lm: PreTrainedModel, base: str, trainable: Optional[str] = None) -> None:
        """Put adapters into a model, in place, and freeze everything else.

        Args:
            lm: a Hugging Face model; its class and its calls stay as they are.
            base: hub id or folder that an adapter folder will name as its base.
            trainable: regular expression for names of parameters that may move; None for all.
        """
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise WagleError("adapter: LoRA needs peft: pip install 'wagle-pl[lora]'") from None
        options: dict[str, Any] = {
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
        }
        options |= {"target_modules": self.target_modules, "base_model_name_or_path": base}
        try:
            self._peft = get_peft_model(lm, LoraConfig(task_type="CAUSAL_LM", **options))
        except ValueError as error:
            where = "adapter.target_modules"
            raise WagleError(f"{self.target_modules}: {error}", option=where) from error
        for name, parameter in lm.named_parameters():
            if trainable is not None and not re.search(trainable, name):
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in lm.parameters()):
            where = f"no weights in what the objective moves ({trainable})"
            raise WagleError(f"the adapter has {where}", hint="adapt those modules")

    def fold(self) -> None:
        """Add B A to the model's weights and remove the adapters, if there are any."""
        if self._peft is not None:
            self._peft.merge_and_unload()
        self._peft = None

    def save(
        self, tokenizer: PreTrainedTokenizerBase, folder: str, card: str, record: dict[str, Any]
    ) -> None:
        """Write a folder with only the adapter, the tokenizer, model card and record."""
        with model_folder(folder, tokenizer, card, record) as temporary:
            self._peft.save_pretrained(temporary)
