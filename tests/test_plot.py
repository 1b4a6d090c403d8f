"""The gate map shows what the plan says, as a picture and in a page."""

from __future__ import annotations

import dataclasses
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from est_lora.config import FusionConfig
from est_lora.gate import BOTH, NEEDS_MODEL, STYLE, SUBJECT, FusionPlan
from est_lora.gate.schedule import Segment
from est_lora.lora import LoraFile
from est_lora.plot import COLOURS, gate_map, gate_map_svg
from tests.files import ATTENTION_LAYERS, FEED_FORWARD, random_lora, write

ACTS = {colour: acts for acts, colour in COLOURS.items()}
SVG = "{http://www.w3.org/2000/svg}"
REFERENCE = re.compile(r'(?:href="|url\()#([^")]+)')
IDENTIFIER = re.compile(r' id="([^"]+)"')


@pytest.fixture
def plan_of(tmp_path):
    def plan_of(subject="knight", style="ink", **knobs):
        names = (*ATTENTION_LAYERS, FEED_FORWARD)
        pair = (write(tmp_path / f"{subject}.safetensors", random_lora(1, names[:-3])),)
        pair += (write(tmp_path / f"{style}.safetensors", random_lora(2, names[3:])),)
        return FusionPlan.of(*map(LoraFile.load, pair), FusionConfig(subject="a", style="b", **knobs))

    return plan_of


def shown(figure):
    """Who acts in each column of each row, by the colours."""
    (image,) = figure.axes[0].images
    return [[ACTS[to_hex(colour)] for colour in row] for row in image.cmap(image.norm(image.get_array()))]


KNOBS = [{}, {"pattern": "s*", "lean": 0.3}, {"other": "off"}, {"method": "sum"}, {"layers": "all", "beta": 0.0}]


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_every_column_shows_who_acts_in_its_middle(plan_of, knobs):
    plan = plan_of(**knobs)
    rows = shown(gate_map(plan))
    assert len(rows) == len(plan.layers)
    for row, layer in zip(rows, plan.layers):
        assert row == [layer.acts((column + 0.5) / len(row)) for column in range(len(row))]


def test_a_switch_in_the_middle_of_a_column(plan_of):
    plan = plan_of()
    width = len(shown(gate_map(plan))[0])
    layers = tuple(
        dataclasses.replace(layer, segments=(Segment(0.0, SUBJECT), Segment((column + 0.5) / width, STYLE)))
        for column, layer in enumerate(plan.layers)
    )
    for column, row in enumerate(shown(gate_map(dataclasses.replace(plan, layers=layers)))):
        assert row == [SUBJECT] * column + [STYLE] * (width - column)


def test_the_picture_has_each_layer_in_its_place(plan_of):
    plan = plan_of(pattern="s*")
    figure = gate_map(plan)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())
    box = figure.axes[0].get_window_extent()
    looked = 0
    for number, layer in enumerate(plan.layers):
        for tau in (0.03, 0.21, 0.5, 0.77, 0.97):
            if any(abs(segment.start - tau) < 0.01 for segment in layer.segments[1:]):
                continue
            x = box.x0 + tau * box.width
            from_top = pixels.shape[0] - box.y1 + (number + 0.5) / len(plan.layers) * box.height
            assert ACTS[to_hex(pixels[int(from_top), int(x)] / 255)] == layer.acts(tau)
            looked += 1
    assert looked > 3 * len(plan.layers)


def test_the_blocks_of_the_network_are_named_beside_their_rows(plan_of):
    plan = plan_of()
    axes = gate_map(plan).axes[0]
    named = dict(zip(axes.get_yticks(), (label.get_text() for label in axes.get_yticklabels())))
    rows = {}
    for number, layer in enumerate(plan.layers):
        block = layer.layer.name.replace("_block.", "_block").split(".")
        rows.setdefault("mid" if block[0].startswith("mid") else f"{block[0][:-7]} {block[1]}", []).append(number)
    assert named == {(numbers[0] + numbers[-1] + 1) / 2: name for name, numbers in rows.items()}
    first, second = axes.transData.transform([(0, 0), (0, 1)])[:, 1]
    assert first > second  # from the top
    assert [line.get_ydata()[0] for line in axes.lines] == [numbers[0] for numbers in rows.values()][1:]


def test_a_block_of_too_few_rows_has_no_name(plan_of):
    plan = plan_of()
    few = [layer for layer in plan.layers if layer.layer.name.startswith("mid")][:1]
    many = [layer for layer in plan.layers if layer.layer.name.startswith("up")] * 10
    axes = gate_map(dataclasses.replace(plan, layers=(*few, *many))).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["up 1"]


def test_the_legend_names_who_acts_and_nobody_else(plan_of):
    plan = plan_of()
    waiting = dataclasses.replace(plan.layers[0], segments=(Segment(0.0, NEEDS_MODEL),))
    for one, expected in (
        (plan, {SUBJECT, STYLE, BOTH} & {layer.acts(tau / 99) for layer in plan.layers for tau in range(100)}),
        (dataclasses.replace(plan, layers=(waiting,)), {NEEDS_MODEL}),
    ):
        legend = gate_map(one).axes[0].get_legend()
        colours = [to_hex(patch.get_facecolor()) for patch in legend.get_patches()]
        patches = dict(zip((text.get_text() for text in legend.texts), colours))
        assert patches == {acts: COLOURS[acts] for acts in expected}


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_the_styles_share_of_the_layers_that_the_gate_decides(plan_of, knobs):
    plan = plan_of(**knobs)
    line = gate_map(plan).axes[1].lines[0]
    assert line.get_drawstyle() == "steps-post"
    x, y = line.get_data()
    gated = [layer for layer in plan.layers if layer.gated]
    for tau in np.linspace(0, 1, 57):
        share = sum(layer.acts(tau) in ("style", "both") for layer in gated) / len(gated)
        assert y[np.searchsorted(x, tau, side="right") - 1] == pytest.approx(100 * share)


def test_steps_are_marked_and_counted(plan_of):
    taus = [0.0, 0.3, 0.9]
    axes = gate_map(plan_of(), taus).axes[1]
    assert list(axes.lines[-1].get_xdata()) == taus
    assert [segment[0][0] for segment in axes.collections[-1].get_segments()] == taus
    assert "3 steps" in [text.get_text() for text in axes.texts]


def test_without_steps_nothing_is_marked(plan_of):
    axes = gate_map(plan_of()).axes[1]
    assert len(axes.lines) == len(axes.collections) == 1
    assert not axes.texts


def test_the_title_says_what_it_is_of(plan_of):
    plan = plan_of(beta=0.25, alpha=2, method="k-lora")
    assert gate_map(plan).axes[0].get_title() == "knight  x  ink\nk-lora, beta 0.25, alpha 2"


@pytest.mark.parametrize("name", ["a<b>&c", "$\\frac{$", "_^$x$", "&lt;", "]]>", "--"])
def test_a_files_name_is_text(plan_of, name):
    figure = gate_map(plan_of(subject=name))
    assert figure.axes[0].get_title().startswith(f"{name}  x  ink\n")
    for kind in ("svg", "png"):
        stream = io.BytesIO()
        figure.savefig(stream, format=kind)
        if kind == "svg":
            ElementTree.fromstring(stream.getvalue())


class TestInAPage:
    def test_it_is_one_element_without_names_of_files(self, plan_of):
        svg = gate_map_svg(plan_of(subject="a<b>&c"))
        assert ElementTree.fromstring(svg).tag == f"{SVG}svg"
        assert "<title" not in svg
        assert "c  x  ink" not in svg

    def test_text_and_lines_take_the_pages_colour(self, plan_of):
        svg = gate_map_svg(plan_of(), [0.0, 0.5])
        texts = [group for group in ElementTree.fromstring(svg).iter(f"{SVG}g") if "-text_" in group.get("id", "")]
        assert len(texts) > 10
        for text in texts:
            drawn = text.findall(f"{SVG}g")
            assert drawn
            assert all("fill: currentColor" in line.get("style", "") for line in drawn)
        colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg))
        assert colours <= {"none", "currentColor", "#ffffff", *COLOURS.values()}
        assert svg.count("currentColor") > 50

    def test_it_has_no_ground_of_its_own(self, plan_of):
        figure = ElementTree.fromstring(gate_map_svg(plan_of())).find(f"{SVG}g")
        ground = figure.find(f"{SVG}g/{SVG}path").get("style")
        assert "fill: none" in ground

    def test_two_have_no_identifier_in_common(self, plan_of):
        plan = plan_of()
        one, other = (IDENTIFIER.findall(gate_map_svg(plan, [0.5])) for _ in range(2))
        assert len(one) == len(set(one)) == len(other) > 20
        assert not set(one) & set(other)

    def test_what_it_refers_to_is_its_own(self, plan_of):
        svg = gate_map_svg(plan_of(), [0.5])
        there = IDENTIFIER.findall(svg)
        assert set(REFERENCE.findall(svg)) <= set(there)
        assert len(REFERENCE.findall(svg)) > 20

    def test_it_sets_no_style_for_the_page(self, plan_of):
        assert "<style" not in gate_map_svg(plan_of())

    def test_steps_are_marked(self, plan_of):
        plan = plan_of()
        none, three = (gate_map_svg(plan, taus).count("<use") for taus in ([], [0.1, 0.5, 0.9]))
        assert three - none >= 3 + len("3 steps") - 1
