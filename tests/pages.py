"""What the tests of reports share: a strict reader of pages, and runs to report."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Optional

import pytest
import torch

from wagle_pl.evaluation.results import write_json, write_table
from wagle_pl.evaluation.suites import TOFUSuite
from wagle_pl.lab.study.report.page import report
from wagle_pl.masks import WeightMask

VOID = {"img", "meta", "wbr"}
#: Elements and attributes by which a page loads something.
LOADING = {
    *("script", "link", "image", "iframe", "object"),
    *("embed", "audio", "video", "base", "form", "source"),
}
LOADING_ATTRIBUTES = ("srcset", "xlink:href", "action", "data")
IMAGE = "data:image/svg+xml;base64,"
EVIL = "</title><script>alert(1)</script><img src='https://example.org/x.png' onerror=alert(2)> & $x_1$"
SHAPES = {
    "model.embed_tokens.weight": (9, 4),
    **{
        f"model.layers.{i}.{name}.weight": (6, 4)
        for i in range(2)
        for name in ("self_attn.q_proj", "mlp.up_proj")
    },
}


# -- a strict reader of pages ----------------------------------------------------------------------


class Node:
    """An element: its attributes, its text, the elements inside it."""

    def __init__(self, tag: str, attributes: dict[str, Optional[str]]) -> None:
        self.tag, self.attributes = tag, attributes
        self.children: list[Node] = []
        self.parts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def all(self, *tags: str) -> Iterator[Node]:
        for child in self.children:
            if not tags or child.tag in tags:
                yield child
            yield from child.all(*tags)


class Strict(HTMLParser):
    """Reads a page whose tags must balance, and whose elements have an attribute once."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.root = Node("", {})
        self.open = [self.root]
        self.feed(page)
        self.close()
        assert self.open == [self.root], f"not closed: {[node.tag for node in self.open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Optional[str]]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(self.open[-1].children[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, Optional[str]]]) -> None:
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.open[-1].children.append(Node(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        node = self.open.pop()
        assert node.tag == tag, f"<{node.tag}> ends with </{tag}>"

    def handle_data(self, data: str) -> None:
        for node in self.open:
            node.parts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"comment {data}")


def read(page: str) -> Node:
    """The page, after everything that must hold of every page."""
    assert page.startswith("<!DOCTYPE html>\n<html lang=")
    root = Strict(page).root
    nodes = list(root.all())
    assert not LOADING & {node.tag for node in nodes}
    for node in nodes:
        for name, value in node.attributes.items():
            assert not name.startswith("on") and name not in LOADING_ATTRIBUTES
            assert name != "href" or value.startswith("#"), value
            assert name != "src" or value.startswith(IMAGE), value
            assert "url(" not in (value or ""), value
    styles = "".join(node.text for node in root.all("style"))
    assert "url(" not in styles and "@import" not in styles
    assert "prefers-color-scheme: dark" in styles
    outside_texts = re.sub(r">[^<]*<", "><", page).replace("http-equiv", "")
    assert "http" not in outside_texts
    ids = [node.attributes["id"] for node in nodes if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    links = [node.attributes["href"][1:] for node in nodes if "href" in node.attributes]
    assert links and set(links) <= set(ids)
    for title, description in figures(root).items():
        assert title and description.strip()
    return root


def numbers(root: Node) -> dict[tuple[str, str], float]:
    """(run, measure) -> number, as far as the page says where its numbers come from."""
    found: dict[tuple[str, str], float] = {}
    for node in root.all("data"):
        value = float(node.attributes["value"])
        shown = float(node.text.rstrip("%").replace(",", "")) / (100 if "%" in node.text else 1)
        assert shown == pytest.approx(value, rel=5.1e-3, abs=1e-12)
        if "data-run" in node.attributes:
            key = (node.attributes["data-run"], node.attributes["data-measure"])
            assert found.setdefault(key, value) == value
    return found


def figures(root: Node) -> dict[str, str]:
    """Title -> description of the figures of a page."""
    return {img.attributes["title"]: img.attributes["alt"] for img in root.all("img")}


def section(root: Node, name: str) -> Node:
    return next(node for node in root.all("section") if node.attributes["id"] == f"{name}-section")


def report_page(
    capsys: pytest.CaptureFixture[str], heard: pytest.LogCaptureFixture, *runs: Any, **options: Any
) -> tuple[Node, str]:
    """What ``wagle report RUNS -o out.html`` does: the page, and what was printed and logged."""
    capsys.readouterr()
    heard.clear()
    report(list(map(str, runs)), **{"output": "out.html", **options})
    said = capsys.readouterr().out + "\n".join(heard.messages)
    return read(Path("out.html").read_text(encoding="utf-8")), said


# -- runs ------------------------------------------------------------------------------------------


def records(prefix: str, known: float, count: int = 8) -> list[dict[str, Any]]:
    """Records of a test set; the truth ratio falls with ``known``."""
    return [
        {
            "row": i,
            "question": f"{prefix} {i}?",
            "answer": f"It is {prefix} {i}.",
            "generation": f"It is {prefix} {i if known > 0.5 else 'gone'}." if i else EVIL,
            "nll": 1 - known,
            "paraphrased_nll": 1.0 + 0.1 * i,
            "perturbed_nll": [1.0 + known + 0.05 * i, 1.2 + known],
            "rougeL_recall": known / (i + 1),
            "rouge1_recall": known,
            "tokens": 4,
            "paraphrased_tokens": 4,
            "perturbed_tokens": [4, 4],
        }
        for i in range(count)
    ]


def write_run(
    folder: Path, knows: float, keeps: float, lineage: Optional[list[dict[str, Any]]] = None
) -> dict[str, float]:
    """A model folder with test results in it, as ``wagle test`` writes them; return its metrics."""
    metrics = {
        "forget/probability": knows + 1 / 3000,
        "forget/rougeL_recall": knows / 7,
        "forget/degenerate": 0.0,
        "forget/perplexity": 30 - 20 * knows,  # best at the retrained model's
        "retain/probability": keeps / 3,
        "retain/perplexity": 12345.678 * keeps,
        "model_utility": keeps * 0.777,
        "forget_quality": knows * 1e-13,
    }
    suite = TOFUSuite()
    undefined = {**vars(suite.info("ue_average")), "why": "it needs wagle/mia <b>which"}
    info = {
        "suite": "TOFUSuite",
        "measures": {name: vars(suite.info(name)) for name in metrics},
        "undefined": {"ue_average": undefined},
        "rows": {"forget": 8, "retain": 9},
        "absent_sets": ["real_authors"],
    }
    key = {"model": f"fingerprint of {folder.name}"}
    write_table(folder / "test/forget.parquet", records("secret", knows), key)
    write_table(folder / "test/retain.parquet", records("fact", keeps, 9), key)
    write_json(folder / "test/metrics.json", metrics)
    write_json(folder / "test/metrics.info.json", info)
    write_json(folder / "wagle.json", {"format_version": 1, "lineage": lineage})
    return metrics


def step(module: str, base: str, **more: Any) -> dict[str, Any]:
    """A run of a lineage."""
    return {
        "module": module,
        "base": base,
        "base_fingerprint": f"fingerprint of {Path(base).name}",
        "steps": 12,
        "data": {"forget": "forget.jsonl (32 rows)", "retain": "retain.jsonl"},
        "streams": ["forget", "retain"],
        "seconds": 12.5,
        "seed": 0,
        "config": {"model": {"init_args": {"note": EVIL}}},
        **more,
    }


def write_runs() -> dict[str, dict[str, float]]:
    """Target, retrained, a model unlearned within a mask and a dense one; name -> metrics."""
    generator = torch.Generator().manual_seed(0)
    bools = {}
    for name, shape in SHAPES.items():
        bools[name] = torch.rand(shape, generator=generator.manual_seed(0)) < 0.5
    made_by = {"score": "Wagle", "density": 0.5, "model_fingerprint": "fingerprint of target"}
    mask = WeightMask.from_bools(bools, made_by)
    mask.save("mask")
    tuned = step("FinetuneModule", "base", streams=["all"])
    retrained = step("FinetuneModule", "base", streams=["retain"])
    objective = {"class": "NPO", "beta": 0.1, "retain": {"class": "NLL"}}
    within = {"file": "mask.safetensors", "density": mask.density, "made_by": made_by}
    dense = step("UnlearnModule", "target", objective=objective)
    masked = {**dense, "mask": within}
    return {
        "target": write_run(Path("target"), 0.9, 0.9, [tuned]),
        "retrained": write_run(Path("retrained"), 0.1, 0.92, [retrained]),
        "masked": write_run(Path("masked"), 0.2, 0.8, [tuned, masked]),
        "dense": write_run(Path("dense"), 0.05, 0.7, [tuned, dense]),
    }
