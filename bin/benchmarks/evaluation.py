"""``bin/bench evaluation``: likelihoods and generations of test rows in batches, against one text at a time."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import Result, Settings, alternate, main, products_per_second, result, seconds
from torch import Tensor, nn

from wagle_pl.data.example import Example, parse_rows
from wagle_pl.data.rows import load_rows
from wagle_pl.data.template import Template
from wagle_pl.evaluation.observe import Observer, answers
from wagle_pl.lm import models

PRECISION = "32-true"
NEEDS = frozenset({"answer", "alternatives"})
TEST_BATCH_SIZE = 32  # the data modules' default
NEW_TOKENS = 96

# -- one text at a time -----------------------------------------------------------------------------------------------


def published_nll(lm: Any, ids: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood of an answer, as the published evaluation code of WAGLE and SOUL computes it.

    Logits of every token, shifted by a copy, and a cross-entropy with the vocabulary before the tokens.
    """
    logits = lm(ids, torch.ones_like(ids)).logits[..., :-1, :].contiguous()
    targets = labels[..., 1:].contiguous()
    losses = nn.CrossEntropyLoss(ignore_index=-100, reduction="none")(
        logits.transpose(-1, -2), targets
    )
    return (losses.sum() / (targets != -100).sum()).item()


def plain_nll(lm: Any, ids: Tensor, labels: Tensor) -> float:
    """The same by transformers' own loss, without keeping keys and values."""
    return lm(input_ids=ids, labels=labels, use_cache=False).loss.item()


class Bench:
    """The model and the rows, and both ways of computing the same numbers.

    Args:
        settings: of the benchmark.
    """

    def __init__(self, settings: Settings) -> None:
        self.lm = models.load_model(settings.model, torch.float32).eval()
        self.template = Template(models.load_tokenizer(settings.model), None, None, 512)
        self.rows = test_rows(settings)

    def observer(self, share: bool = True) -> Observer:
        """Ours, as ``wagle test`` makes it."""
        return Observer(self.lm, self.template, TEST_BATCH_SIZE, NEW_TOKENS, share=share)

    def batched(self, share: bool = True) -> list[float]:
        """All likelihoods, in batches."""
        found = []
        for record in in_batches(self.rows, partial(self.observer(share).observe, needs=NEEDS)):
            found += [record["nll"], record["paraphrased_nll"], *record["perturbed_nll"]]
        return found

    def alone(self, nll: Callable[[Any, Tensor, Tensor], float]) -> list[float]:
        """All likelihoods, each answer alone."""
        found = []
        for row in self.rows:
            by_kind: dict[str, list[float]] = {}
            for named in answers(self.template, row, NEEDS):
                ids, labels = (torch.tensor([list(v)]) for v in (named.ids, named.labels))
                by_kind.setdefault(named.kind, []).append(nll(self.lm, ids, labels))
            own = by_kind["answer"]
            found += [
                *own,
                *by_kind.get("paraphrased_answer", own),
                *by_kind.get("perturbed_answer", []),
            ]
        return found

    def operations(self, run: Callable[[], Any]) -> int:
        """Floating-point operations of the products with weights of all linear layers."""
        count = 0

        def add(layer: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
            nonlocal count
            count += 2 * inputs[0].numel() * layer.out_features

        layers = [m for m in self.lm.modules() if isinstance(m, nn.Linear)]
        hooks = [layer.register_forward_pre_hook(add) for layer in layers]
        run()
        for hook in hooks:
            hook.remove()
        return count

    def generated(self) -> list[str]:
        """All generations, in batches."""
        observe = partial(self.observer().observe, needs={"generation"})
        return [record["generation"] for record in in_batches(self.rows, observe)]

    def generated_alone(self) -> list[str]:
        """All generations, each alone, by transformers."""
        tokenizer, texts = self.template.tokenizer, []
        for row in self.rows:
            ids = torch.tensor([self.template.encode_prompt(row)])
            out = self.lm.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
        return texts


def test_rows(settings: Settings) -> list[Example]:
    """Forget rows with perturbed answers: TOFU's, beside the rows of ``--tofu``, or the bundled people's."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--tofu")
    folder = parser.parse_known_args()[0].tofu
    file = str(Path(folder) / "forget01_perturbed.json") if folder else settings.forget
    return parse_rows(load_rows(file)[: settings.rows], file)


def in_batches(
    rows: Sequence[Example], observe: Callable[[Sequence[Example]], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Records of all rows, observed as a data module's loader hands them out but in order."""
    starts = range(0, len(rows), TEST_BATCH_SIZE)
    return [record for start in starts for record in observe(rows[start : start + TEST_BATCH_SIZE])]


def figures(bench: Bench, **more: Any) -> dict[str, Any]:
    """What every row of the report tells of its run."""
    sample = bench.rows[0]
    own = {"precision": PRECISION, "rows": len(bench.rows), "test_batch_size": TEST_BATCH_SIZE}
    return {**own, "perturbed_answers": len(sample.perturbed_answers), **more}


# -- rows -------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_likelihoods(settings: Settings) -> list[Result]:
    """Rows 1 and 2: all likelihoods against one answer at a time, and against batches that share no prompt.

    ``bound`` is the ratio if the batches' time were that of their products with weights, at the rate of products alone.
    """
    bench = Bench(settings)
    operations = {  # which warms up
        "batched": bench.operations(bench.batched),
        "published": bench.operations(partial(bench.alone, published_nll)),
    }
    sides = {
        "batched": lambda: seconds(bench.batched),
        "published": lambda: seconds(partial(bench.alone, published_nll)),
        "plain": lambda: seconds(partial(bench.alone, plain_nll)),
        "unshared": lambda: seconds(partial(bench.batched, share=False)),
        "products": lambda: products_per_second(
            settings.model, 2048, torch.float32, backward=False
        ),
    }
    runs = alternate(settings, sides)
    at = {name: median(values) for name, values in runs.items()}
    plain, ratio, shared = (at[n] / at["batched"] for n in ("plain", "published", "unshared"))
    raw = figures(bench, seconds=runs)
    own = {
        **raw,
        "ratio_to_transformers_loss": plain,
        "operations": operations,
        "share_of_products": {n: v / at[n] / at["products"] for n, v in operations.items()},
        "bound": at["published"] * at["products"] / operations["batched"],
    }
    return [
        result("likelihoods", ratio, 3.5, True, "x faster than one at a time", own),
        result("shared_prompt", shared, 1, True, "x faster than unshared", raw),
    ]


@torch.inference_mode()
def measure_generation(settings: Settings) -> list[Result]:
    """Row 3: generations against one row at a time."""
    bench = Bench(settings)
    bench.lm(torch.zeros(4, 64, dtype=torch.long))
    sides = {
        "batched": lambda: seconds(bench.generated),
        "alone": lambda: seconds(bench.generated_alone),
    }
    runs = alternate(settings, sides)
    ratio = median(runs["alone"]) / median(runs["batched"])
    raw = figures(bench, seconds=runs, max_new_tokens=NEW_TOKENS)
    return [result("generation", ratio, 5, True, "x faster than one at a time", raw)]


@torch.inference_mode()
def measure_equality(settings: Settings) -> list[Result]:
    """Row 4: the same results in batches as one at a time."""
    bench = Bench(settings)
    pairs = zip(bench.batched(), bench.alone(plain_nll), strict=True)
    worst = max(abs(here - there) for here, there in pairs)
    texts = list(zip(bench.generated(), bench.generated_alone(), strict=True))
    other = [{"batched": here, "alone": there} for here, there in texts if here != there]
    raw = figures(bench, max_new_tokens=NEW_TOKENS)
    own, unit = {**raw, "differing": other}, f"of {len(texts)} differ"
    return [
        result("equal/likelihoods", worst, 1e-4, False, "largest difference of a mean NLL", raw),
        result("equal/generations", len(other), 0, False, unit, own),
    ]


ROWS = {
    "likelihoods": measure_likelihoods,
    "generation": measure_generation,
    "equal": measure_equality,
}

if __name__ == "__main__":
    main("evaluation", ROWS, {})
