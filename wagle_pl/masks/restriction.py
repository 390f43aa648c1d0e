"""``Restriction``: a choice of weights by mask file, module, layer and name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import reduce
from math import prod
from operator import and_
from typing import Any, NamedTuple, Optional, Union

from wagle_pl.core.errors import WagleError
from wagle_pl.masks.bits import filled_bits
from wagle_pl.masks.mask import Shapes, WeightMask
from wagle_pl.masks.names import in_module, layer_of, parse_layers


class Restriction(NamedTuple):
    """Only the weights that all given fields select; every weight if all fields are None.

    >>> Restriction(modules=["mlp"], layers="3-7").takes("model.layers.7.mlp.up_proj.weight")
    True
    """

    file: Optional[Union[str, WeightMask]] = None  # a mask, or the path of its file
    modules: Optional[Sequence[str]] = None  # such as ["mlp.down_proj"], see in_module
    layers: Optional[str] = None  # see parse_layers
    matching: Optional[str] = None  # a regular expression, found anywhere in a parameter's name

    @classmethod
    def of_record(
        cls, record: Mapping[str, Any], file: Optional[Union[str, WeightMask]] = None
    ) -> Restriction:
        """The restriction of a checkpoint's run, with another mask file if it is given."""
        fields = {name: record.get(name) for name in cls._fields}
        return cls(**fields | ({} if file is None else {"file": file}))

    def takes(self, name: str) -> bool:
        """Whether modules, layers and pattern select a parameter, by its name."""
        return (
            (not self.modules or any(in_module(name, module) for module in self.modules))
            and (self.layers is None or layer_of(name) in parse_layers(self.layers))
            and (self.matching is None or re.search(self.matching, name) is not None)
        )

    def mask(
        self, shapes: Shapes, model: Optional[str] = None, fingerprint: Optional[str] = None
    ) -> Optional[WeightMask]:
        """The mask for a model; None if nothing is restricted.

        Raises:
            WagleError: if the file is for another model, or the model lacks the modules or layers.
        """
        masks = []
        if self.file is not None:
            mask, where = self.file, "the mask"
            if not isinstance(mask, WeightMask):
                mask, where = WeightMask.load(mask), f"mask {mask}"
            mask.check(shapes, fingerprint, where=where)
            masks.append(mask)
        if self.modules or self.layers or self.matching is not None:
            self._check_names(shapes)
            pattern = [] if self.matching is None else [f"matching {self.matching}"]
            made_by = {"operation": "modules", "modules": [*(self.modules or ()), *pattern]}
            made_by |= {"layers": self.layers}
            if model is not None:
                made_by |= {"model": model, "model_fingerprint": fingerprint}
            bits = {name: filled_bits(prod(s), self.takes(name)) for name, s in shapes.items()}
            masks.append(WeightMask(bits, shapes, made_by))
            if not any(packed.any() for packed in bits.values()):
                raise WagleError(
                    f"nothing is selected: the model has no weights in {masks[-1].origin}"
                )
        return reduce(and_, masks) if masks else None

    def _check_names(self, shapes: Shapes) -> None:
        """Refuse modules and layers that the model lacks, and a pattern that is none."""
        for module in self.modules or ():
            if not any(in_module(name, module) for name in shapes):
                parts = (p for n in shapes for p in n.split(".")[:-1] if not p.isdigit())
                raise WagleError(
                    f"no parameter lies in a module {module!r}; the model has "
                    f"{', '.join(dict.fromkeys(parts))}"
                )
        layers = {layer_of(name) for name in shapes} - {None}
        chosen = layers if self.layers is None else parse_layers(self.layers)
        if missing := chosen - layers:
            has = f"layers 0-{max(layers)}" if layers else "no numbered layers"
            raise WagleError(f"layers: there is no layer {min(missing)}, the model has {has}")
        try:
            re.compile(self.matching or "")
        except re.error as error:
            raise WagleError(f"{self.matching!r} is no regular expression: {error}") from None
