"""Pictures of masks: densities by block and module, drawn and in text."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from wagle_pl.core.errors import WagleError
from wagle_pl.core.text import percent
from wagle_pl.lab.study.report.figures import figure_paths, mask_heatmap
from wagle_pl.masks.grid import axes_of, mask_text


def grid(layers: int, share: float = 0.1) -> dict[str, dict[str, float]]:
    rows = {
        str(i): {"q": share, "norms": 0.0, "gate": 1.0, "down": share * i / layers}
        for i in range(layers)
    }
    return rows | {"other": {"embed_tokens": share, "norm": 0.0, "lm_head": 0.0005}}


@pytest.mark.parametrize(("layers", "masks"), [(1, 1), (32, 1), (2, 5), (160, 2)])
def test_heat_map(layers: int, masks: int) -> None:
    figure = mask_heatmap({f"mask {i}": grid(layers, 0.1 * (i + 1)) for i in range(masks)})
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    *panels, bar = figure.axes
    assert len(panels) == 2 * masks and bar.get_ylabel()
    top, strip = panels[:2]
    meshes = [axes.collections[0] for axes in panels]
    assert {(mesh.norm.vmin, mesh.norm.vmax) for mesh in meshes} == {(0, 100)}  # one scale for all
    assert meshes[0].get_array().shape == (layers, 4)
    assert meshes[0].get_array()[layers - 1].tolist() == pytest.approx(
        [10, 100, 10 * (layers - 1) / layers, 0]
    )
    assert [t.get_text() for t in top.get_xticklabels()] == ["q", "gate", "down", "norms"]
    assert [t.get_text() for t in strip.get_xticklabels()] == ["embed_tokens", "norm", "lm_head"]
    assert top.yaxis_inverted() and top.get_yticklabels()[0].get_text() == "0"
    if layers < 100:  # each number lies inside its cell, and reads
        renderer = canvas.get_renderer()
        cell = top.get_window_extent().height / layers
        texts = [text.get_window_extent(renderer) for text in top.texts]
        assert len(texts) == 4 * layers and max(box.height for box in texts) < cell
        assert max(box.width for box in texts) < top.get_window_extent().width / 4
    else:
        assert not top.texts


def test_heat_map_without_layers_and_without_selection() -> None:
    figure = mask_heatmap({"empty": {"other": {"weight": 0.0}}})
    figure.canvas.draw()
    said = mask_text({"empty": {"other": {"weight": 0.0}}})
    assert said.split() == ["empty", "outside", "the", "layers", "weight", "0%"]


def test_modules_that_one_mask_lacks_are_blank() -> None:
    one, two = {"0": {"q": 0.5}}, {"0": {"q": 0.1, "up": 0.2}, "1": {"q": 0.3, "up": 0.4}}
    assert axes_of([one, two]) == (["q", "up"], ["0", "1"], [])
    figure = mask_heatmap({"one": one, "two": two})
    assert figure.axes[0].collections[0].get_array().mask.tolist() == [[False, True], [True, True]]


def test_text_says_what_the_picture_says() -> None:
    text = mask_text({"first": grid(2, 0.125)})
    assert text.splitlines() == [
        "first",
        "layer    q  gate  down  norms",
        "0      12%  100%    0%     0%",
        "1      12%  100%  6.2%     0%",
        "outside the layers  embed_tokens  norm  lm_head",
        "                             12%    0%    <0.1%",
    ]
    shares = (0.00049, 0.0994, 0.0996, 0.9949, 0.9951)
    assert [percent(share) for share in shares] == ["<0.1", "9.9", "10", "99", ">99"]


def test_figure_paths(tmp_path: Path) -> None:
    assert [p.name for p in figure_paths(tmp_path / "x")] == ["x.png", "x.svg"]
    assert [p.name for p in figure_paths(tmp_path / "x.SVG")] == ["x.SVG"]
    (tmp_path / "x.svg").touch()
    with pytest.raises(WagleError, match="--overwrite"):
        figure_paths(tmp_path / "x")
    assert len(figure_paths(tmp_path / "x", overwrite=True)) == 2
