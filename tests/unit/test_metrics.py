"""Measures as torchmetrics metrics: equal to the suites', over ranks, in a module, beside torchmetrics' own."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from pathlib import Path
from random import Random

import lightning as L
import pytest
import torch
import torch.distributed as dist
from forked import start
from helpers import changed, places, trainer
from test_file_doors import OTHERS
from test_measures_suites import as_results, asked, corpus
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.functional.text import perplexity, rouge_score, sacre_bleu_score
from torchmetrics.wrappers import BootStrapper

from wagle_pl import WagleError, metrics
from wagle_pl.evaluation import MEASURES, Observations, Undefined, find_suite
from wagle_pl.evaluation import functional as F
from wagle_pl.evaluation.records import defined_only, intervals
from wagle_pl.metrics import AnswerProbability, ForgetQuality, PrivLeak, TruthRatio, suite_metrics

TOFU = ("forget", "retain", "real_authors", "world_facts", "holdout")


def tables_of(suite: str) -> dict[str, list]:
    if suite == "tofu":
        return {name: asked(6) for name in TOFU}
    texts = {name: corpus(6) for name in ("members", "nonmembers")}
    knowledge = {name: asked(6) for name in ("knowmem_forget", "knowmem_retain")}
    verbatim = asked(6, reference="some words of text")
    return texts | ({"verbmem_forget": verbatim, **knowledge} if suite == "muse" else {})


@pytest.mark.parametrize("suite", ["tofu", "muse", "generic"])
def test_a_collection_gives_the_values_of_its_suite(suite, tmp_path):
    tables = tables_of(suite)
    retrained = as_results(
        {n: t if n == "forget" else asked(6) for n, t in tables.items()}, tmp_path
    )
    expected = find_suite(suite).measures(Observations(tables, retrained=retrained))
    collection = suite_metrics(suite, list(expected), retrained=retrained)
    for (
        name,
        table,
    ) in tables.items():  # in parts, as batches are, out of order and with a repeated row
        collection.update(table[3:], name)
        collection.update(table[:4], name)
    found = collection.compute()
    assert len(collection.compute_groups) == 1  # the records are held once
    for name, value in expected.items():
        if isinstance(value, Undefined):
            assert math.isnan(found[name]) and collection[name].undefined == str(value)
        else:
            assert found[name].item() == value, name
    assert len(defined_only(expected)) >= 8


def test_every_measure_has_a_class_of_its_own():
    assert {"ForgetQuality", "TruthRatio", "ExtractionStrength", "RougeLRecall"} <= {*dir(metrics)}
    for name in MEASURES:
        kind = getattr(metrics, metrics.metric_class(name).__name__)
        assert isinstance(kind(), Metric)
        assert kind.measure == name and kind.__doc__
        assert pickle.loads(pickle.dumps(kind)) is kind
    with pytest.raises(AttributeError, match="no attribute 'TruthRatios'"):
        _ = metrics.TruthRatios


def test_columns_are_rows(tmp_path):
    rows = [record | {"row": number} for number, record in enumerate(asked(5))]
    by_columns, by_rows = TruthRatio(), TruthRatio()
    by_rows.update(rows)
    numbers = {n: torch.tensor([r[n] for r in rows]).double() for n in ("paraphrased_nll",)}
    by_columns.update(perturbed_nll=[r["perturbed_nll"] for r in rows], **numbers)
    assert by_rows.compute().item() == pytest.approx(by_columns.compute().item(), rel=1e-6)
    kept = TruthRatio("retain")
    kept.update(rows)
    seen = Observations({"retain": rows}).records("retain")
    assert kept.compute().item() == MEASURES["truth_ratio"].compute(seen)
    quality = ForgetQuality(retrained=as_results({"forget": rows}, tmp_path))
    quality.update(rows)
    assert quality.compute().item() == 1.0
    alone = ForgetQuality()
    alone.update(rows)
    assert alone.compute().isnan() and "--model.retrained" in alone.undefined
    leak = PrivLeak(corpus="news")
    for name in ("members", "nonmembers"):
        leak.update(corpus(4), name)
    assert leak.compute().isfinite()


def rank(number: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(number), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=2)
    tables = json.loads(Path(folder, "tables.json").read_text())
    names = list(find_suite("tofu").measures(Observations(tables)))
    collection, probability = suite_metrics("tofu", names), AnswerProbability()
    for name, table in tables.items():
        collection.update(table[:4] if number else table[3:], name)  # both have seen row 3
    for record in tables["forget"][number::2]:
        probability.update(nll=torch.tensor([record["nll"]], dtype=torch.float64))
    values = {name: value.item() for name, value in collection.compute().items()}
    values["alone"] = probability.compute().item()
    Path(folder, f"{number}.json").write_text(json.dumps(values))
    dist.destroy_process_group()


def test_two_ranks_give_the_values_of_one(tmp_path):
    tables = {name: asked(6) for name in TOFU}
    (tmp_path / "tables.json").write_text(json.dumps(tables))
    ranks = [start(rank, n, str(tmp_path), output=tmp_path / f"log{n}") for n in (0, 1)]
    for process in ranks:
        process.join(120)
    assert [p.exitcode for p in ranks] == [0, 0], (tmp_path / "log0").read_text()
    expected = defined_only(find_suite("tofu").measures(Observations(tables)))
    for number in (0, 1):
        found = json.loads((tmp_path / f"{number}.json").read_text())
        assert found.pop("alone") == pytest.approx(expected["forget/probability"])
        assert {name: value for name, value in found.items() if not math.isnan(value)} == expected


class Small(L.LightningModule):
    """Measures what its validation batches hold."""

    def __init__(self) -> None:
        super().__init__()
        self.probability = AnswerProbability()
        self.both = MetricCollection(
            [metrics.Perplexity("retain"), metrics.RowPerplexity("retain")]
        )

    def validation_step(self, batch: Tensor, _: int) -> None:
        self.probability.update(nll=batch)
        self.log("probability", self.probability)
        self.both.update(nll=batch, tokens=torch.ones_like(batch))
        self.log_dict(self.both)


def test_a_module_logs_metrics():
    nll = torch.tensor([0.5, 1.0, 2.0, 0.1, 0.7])
    (logged,) = trainer().validate(Small(), torch.utils.data.DataLoader(nll, 2), verbose=False)
    assert logged["probability"] == pytest.approx(torch.exp(-nll).mean().item())
    assert logged["Perplexity"] == pytest.approx(nll.mean().exp().item())


#: Columns that :func:`asked` does not give.
FURTHER = {
    "reference": "some words",
    "answer_aliases": ["x"],
    "label": 1,
    "choice_logprobs": [-1.0, -2.0],
    "choice_nll": [1.0, 2.0],
    "choice_text_logprobs": [-1.0, -2.0],
    "right_choices": [1],
    "toxicity": 0.1,
}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda m: m.update(nll=torch.zeros(2, 3)),
            "[0].nll: must be a number or null, got [0.0",
        ),
        (lambda m: m.update(nll=["a"]), "[0].nll: must be a number or null, got 'a'"),
        (lambda m: m.update(nll=None), "nll: must be a list, got None"),
        (lambda m: m.update(nll=torch.tensor(1.0)), "nll: must be a list, got 1.0"),
        (lambda m: m.update(nll=torch.zeros(2, device="meta")), "Cannot copy out of meta tensor"),
        (lambda m: m.update(generation="abc"), "generation: must be a list, got 'abc'"),
        (lambda m: m.update([1, 2]), "[0]: must be an object, got 1"),
        (lambda m: m.update("abc"), "[0]: must be an object, got 'a'"),
        (lambda m: m.update(nll=torch.zeros(2), tokens=[1]), "in length: {'nll': 2, 'tokens': 1}"),
        (lambda m: type(m)(test_set=5), "test_set: must be a text, got 5"),
        (lambda m: type(m)(retrained="x"), "retrained: must be a Results or null, got 'x'"),
        (lambda m: metrics.metric_class("truthratio"), "did you mean truth_ratio?"),
        (lambda m: metrics.MeasureMetric(), "key: must be given for a metric without a measure"),
    ],
)
def test_a_wrong_call_is_one_line(call, said):
    with pytest.raises(WagleError, match=re.escape(said)):
        call(AnswerProbability())


def test_any_column_of_another_kind_is_measured_or_refused():
    names = ("truth_ratio", "accuracy", "mc1", "mc2", "member_zlib", "member_min_k_plus_plus")
    kinds = [metrics.metric_class(n) for n in (*names, "row_perplexity", "toxicity", "rougeL_f1")]
    table = [record | FURTHER for record in asked(3)]
    columns, draw, refused = [at for at in places(table) if at[:1] == (1,)], Random(0), 0
    for _ in range(600):
        metric = draw.choice(kinds)()
        try:
            metric.update(changed(table, draw.choice(columns), draw.choice([..., *OTHERS])))
            assert metric.compute().isnan() == bool(metric.undefined)
        except WagleError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 200 < refused < 500


# -- torchmetrics' own ------------------------------------------------------------------------------------------------


def test_areas_are_those_of_torchmetrics():
    for seed in range(8):
        draw = torch.Generator().manual_seed(seed)
        members, others = (torch.randn(n, generator=draw).double() * 3 for n in (40, 51))
        if seed % 2:
            members, others = members.round(), others.round()  # with ties
        label = torch.cat([torch.ones(40), torch.zeros(51)]).long()
        scores = -torch.cat([members, others])
        theirs = binary_auroc((scores - scores.min()) / (scores.max() - scores.min()), label).item()
        assert F.membership_auc(members, others) == pytest.approx(theirs, abs=1e-6)


def test_perplexity_is_that_of_torchmetrics_on_logits():
    logits = torch.randn(3, 7, 11)
    target = torch.randint(11, (3, 7))
    ours = metrics.Perplexity("retain")
    nll = torch.nn.functional.cross_entropy(logits.mT, target, reduction="none").mean(-1)
    ours.update(nll=nll.double(), tokens=[7] * 3)
    assert ours.compute().item() == pytest.approx(perplexity(logits, target).item(), rel=1e-6)


def test_the_bootstrap_of_torchmetrics_draws_the_same_intervals():
    rows = [{"nll": value} for value in torch.rand(40).double().tolist()]
    ours = intervals(
        lambda tables: {"p": math.exp(-sum(r["nll"] for r in tables["a"]) / 40)}, {"a": rows}, 400
    )
    quantile = torch.tensor([0.025, 0.975], dtype=torch.float64)
    theirs = BootStrapper(
        metrics.RowPerplexity(), 400, quantile=quantile, sampling_strategy="multinomial"
    )
    theirs.update(nll=torch.tensor([row["nll"] for row in rows]))
    drawn = sorted(1 / theirs.compute()["quantile"])
    assert [value.item() for value in drawn] == pytest.approx(ours["p"], abs=0.02)


def test_sentence_scores_of_torchmetrics_are_others():
    """Why BLEU and ROUGE stay those of sacrebleu and rouge-score."""
    spoken, answer = "She wrote novels on bakeries", "She has written a novel about two bakeries"
    assert F.bleu([spoken], [answer]).item() > 1
    assert sacre_bleu_score([spoken], [[answer]]).item() == 0  # no smoothing
    ours = F.rouge([spoken], [answer])["rougeL_recall"].item()
    theirs = rouge_score(spoken, answer, rouge_keys="rougeL", use_stemmer=False)["rougeL_recall"]
    assert theirs.item() != pytest.approx(ours)  # with stems it needs nltk
