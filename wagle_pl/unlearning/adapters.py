"""Adapters: a baseline that trains a few new weights and leaves those of the model alone.

An adapter that has not been trained adds exactly nothing, so log-probabilities at θ₀ may be
computed before the first step, adapter in place.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Optional, Union

from wagle_pl.core.errors import WagleError
from wagle_pl.lm.saving import model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LoRA:
    """Low-rank adapters W x + (alpha / r) B A x, through ``peft`` (arXiv 2106.09685).

    Args:
        r: rank of B A.
        alpha: the adapter's output is scaled by alpha / r.
        dropout: of the adapter's input while training.
        target_modules: endings of names of linear layers; ``all-linear``: all but the output layer.
        merge: write a whole model, with B A in the weights; False writes a folder of just the
            adapter, which stands for it wherever ``peft`` is installed and the base is in place.
    """

    def __init__(
        self,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        target_modules: Union[list[str], str] = "all-linear",
        merge: bool = True,
    ) -> None:
        for option, good, must in (
            (f"r {r}", r >= 1, "be at least 1"),
            (f"alpha {alpha}", alpha > 0, "be above 0"),
            (f"dropout {dropout}", 0 <= dropout < 1, "lie in [0, 1)"),
        ):
            if not good:
                raise WagleError(f"adapter.{option} must {must}")
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.target_modules = target_modules
        self.merge = merge
        self._peft: Any = None

    def add(self, lm: PreTrainedModel, base: str, trainable: Optional[str] = None) -> None:
        """Put adapters into a model, in place, and freeze everything else.

        Args:
            lm: a Hugging Face model; its class and its calls stay as they are.
            base: hub id or folder that an adapter folder will name as its base.
            trainable: regular expression that finds the names of what may move; None for all.
        """
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise WagleError("adapter LoRA needs peft: pip install 'wagle-pl[lora]'") from None
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            base_model_name_or_path=base,
            task_type="CAUSAL_LM",
        )
        try:
            self._peft = get_peft_model(lm, config)
        except ValueError as error:
            raise WagleError(f"adapter.target_modules {self.target_modules}: {error}") from error
        for name, parameter in lm.named_parameters():
            if trainable is not None and not re.search(trainable, name):
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in lm.parameters()):
            raise WagleError(
                f"the adapter has no weights in what the objective moves ({trainable}): adapt "
                "those modules"
            )

    def fold(self) -> None:
        """Add B A to the model's weights and take the adapters out."""
        self._peft.merge_and_unload()

    def save(
        self, tokenizer: PreTrainedTokenizerBase, folder: str, card: str, record: dict[str, Any]
    ) -> None:
        """Write a folder of just the adapter, with tokenizer, model card and record."""
        with model_folder(folder, tokenizer, card, record) as temporary:
            self._peft.save_pretrained(temporary)
