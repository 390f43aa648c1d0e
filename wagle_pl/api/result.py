"""What :func:`wagle_pl.forget` returns."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union
from weakref import WeakKeyDictionary

import torch
from markupsafe import Markup
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wagle_pl.api.subject import Origin
from wagle_pl.api.verdict import Outcome
from wagle_pl.core import html
from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import refuse_base, refuse_existing, write_text
from wagle_pl.core.hub import upload
from wagle_pl.core.schema import check
from wagle_pl.core.stopping import undone_at_sigterm
from wagle_pl.core.weights import fingerprint
from wagle_pl.data.example import Example
from wagle_pl.lm.models import checkpoint_dtype, load_model
from wagle_pl.lm.saving import Originals, save_model
from wagle_pl.masks import WeightMask
from wagle_pl.unlearning.export import model_card
from wagle_pl.unlearning.patch import make_patch

#: What earlier calls made a loaded model forget: its record and rows.
HISTORY: WeakKeyDictionary[PreTrainedModel, tuple[dict[str, Any], list[Example]]] = (
    WeakKeyDictionary()
)


@dataclass
class Forgotten:
    """The model, the verdict, and what they rest on.

    ``before`` and ``after`` are means over rows: ``forget_probability``, ``reworded_probability``
    (the forget rows in other words) and ``retain_probability`` (rows held out of training) are
    geometric means of the probabilities of the answer's tokens; ``unseen_probability`` is that of
    rows of the same form that the model has never seen; ``forget_rougeL`` is the recall of the
    answer in a greedy generation.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    mask: Optional[WeightMask]
    before: dict[str, float]
    after: dict[str, float]
    #: ``outcome`` with the numbers that say so.
    verdict: str
    #: ``forgotten``, ``partly forgotten``, ``model damaged`` or ``not known before``.
    outcome: Outcome
    steps: int
    #: (question, answer to forget, what the model said before, and after) of some forget rows.
    answers: list[tuple[str, str, str, str]] = field(repr=False)
    #: What made the model, as in the ``wagle.json`` of its folder.
    record: dict[str, Any] = field(repr=False)
    _base: Optional[str] = field(repr=False)
    _origin: Origin = field(repr=False)

    def save(self, folder: Union[str, Path], overwrite: bool = False) -> Path:
        """Write the model, its tokenizer, a model card and ``wagle.json`` into a new folder.

        Args:
            overwrite: replace a folder that this package wrote and that holds nothing else; never
                the model that was the base.

        Raises:
            WagleError: if the folder exists and may not be replaced, the model did not change, or a
                later call changed it.
        """
        check(folder, Union[str, Path], "folder")
        folder = Path(folder)
        if self.outcome == "not known before":
            raise WagleError("the model was not changed, so there is nothing to save")
        if HISTORY.get(self.model, [self.record])[0] is not self.record:
            raise WagleError(
                "a later call of forget changed the model: save the result of that call"
            )
        for base in filter(None, (self._base, self.model.config.name_or_path)):
            refuse_base(folder, base)
        refuse_existing(folder, overwrite, "overwrite=True", kind="folder")
        originals = Originals(self._base) if self._base is not None else None
        card = model_card(self.record)
        save_model(self.model, self.tokenizer, str(folder), card, self.record, originals)
        return folder

    def report(self, path: Union[str, Path], overwrite: bool = False, redact: bool = False) -> Path:
        """Write an HTML page: the verdict, the measures, and what the model answers.

        Args:
            redact: show digests of rows, as the record has them, and no text.
        """
        check(path, Union[str, Path], "path")
        refuse_existing(Path(path), overwrite, "overwrite=True")
        title = f"Unlearning of {self._base or self.model.config.name_or_path or 'a loaded model'}"
        write_text(Path(path), html.page(title, self._sections(redact)))
        return Path(path)

    def _sections(self, redact: bool) -> Iterator[Markup]:
        """What the page shows."""
        rows = [[n.replace("_", " "), value, self.after[n]] for n, value in self.before.items()]
        # without a step, the verdict quotes a row, and there is no record
        verdict = self.verdict if self.steps or not redact else self.outcome
        told = f"{self.steps} steps"
        if self.mask:
            told += f"; {self.mask.density:.3g} of the weights could move"
        yield html.element(
            "section",
            html.element("h2", "Result"),
            html.element("p", f"{verdict[:1].upper()}{verdict[1:]}."),
            html.table(["measure", "before", "after"], rows),
            html.note(f"{told}."),
        )
        if redact:
            digests = self.record["lineage"][-1]["request"]["row_digests"] if self.steps else []
            yield html.element("ul", *(html.element("li", digest) for digest in digests))
            return
        labels = ("to forget", "before", "after")
        exchanges = (
            html.exchange(
                question, [(label, text, "") for label, text in zip(labels, texts, strict=True)]
            )
            for question, *texts in self.answers
        )
        yield html.element("section", html.element("h2", "Answers"), *exchanges)

    @undone_at_sigterm()
    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what :meth:`save` writes, see :func:`wagle_pl.core.hub.upload`."""
        with tempfile.TemporaryDirectory() as folder:
            return upload(self.save(Path(folder) / "model"), repo_id, **options)

    @undone_at_sigterm()
    def patch(self, path: Union[str, Path], overwrite: bool = False) -> Path:
        """Write the difference from the model before, for ``wagle patch apply`` and ``revert``.

        Raises:
            WagleError: if the base is no longer the model that was loaded.
        """
        refuse_existing(Path(path), overwrite, "overwrite=True")
        with tempfile.TemporaryDirectory() as folder:
            after = self.save(Path(folder) / "after")
            if self._base is not None:
                base = self._base
                lm = load_model(base, checkpoint_dtype(base) or torch.float32)
                if fingerprint(lm) != self.record["lineage"][-1]["base_fingerprint"]:
                    why = "a patch from it to the unlearned model would be wrong"
                    raise WagleError(f"{base} has changed since it was loaded: {why}")
            else:
                before = copy.deepcopy(self.model)
                before.load_state_dict(self._origin.parameters(), strict=False)
                base = str(Path(folder) / "before")
                save_model(
                    before, self.tokenizer, base, "", {"format_version": 1, "lineage": []}, None
                )
            make_patch(base, after, path, overwrite)
        return Path(path)
