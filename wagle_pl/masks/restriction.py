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
        made_for = {} if model is None else {"model": model, "model_fingerprint": fingerprint}

        def whole_tensors(where: Restriction, **about: Any) -> WeightMask:
            bits = {name: filled_bits(prod(s), where.takes(name)) for name, s in shapes.items()}
            return WeightMask(bits, shapes, made_for | {"operation": "modules"} | about)

        found = []
        if self.file is not None:
            given = isinstance(self.file, WeightMask)
            found.append(self.file if given else WeightMask.load(self.file))
            where = "the mask" if given else f"mask {self.file}"
            found[0].check(shapes, fingerprint, where=where)
        if self.modules or self.layers:
            self._check_names(shapes)
            modules, inside = list(self.modules or ()), self._replace(matching=None)
            found.append(whole_tensors(inside, modules=modules, layers=self.layers))
            if not found[-1].count():
                raise WagleError(
                    f"modules {', '.join(modules)} have no weights in layers {self.layers}: "
                    "nothing is selected"
                )
        if self.matching is not None:
            try:
                re.compile(self.matching)
            except re.error as error:
                raise WagleError(f"{self.matching!r} is no regular expression: {error}") from None
            pattern = Restriction(matching=self.matching)
            found.append(whole_tensors(pattern, modules=[f"matching {self.matching}"]))
        return reduce(and_, found) if found else None

    def _check_names(self, shapes: Shapes) -> None:
        for module in self.modules or ():
            if not any(in_module(name, module) for name in shapes):
                parts = (p for n in shapes for p in n.split(".")[:-1] if not p.isdigit())
                raise WagleError(
                    f"no parameter lies in a module {module!r}; the model has "
                    f"{', '.join(dict.fromkeys(parts))}"
                )
        chosen = frozenset() if self.layers is None else parse_layers(self.layers)
        there = {layer_of(name) for name in shapes} - {None}
        if missing := chosen - there:
            has = f"layers 0-{max(there)}" if there else "no numbered layers"
            raise WagleError(f"layers: there is no layer {min(missing)}, the model has {has}")
