"""Knobs as axes of the X/Y/Z plot: a stub of it reads values and makes cells as the host's does."""

from __future__ import annotations

import copy
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest

from est_lora.config import BY_KEY, FIELDS
from est_lora.errors import EstLoraError
from est_lora.hosts.webui import axes
from tests.hosts.webui import fakes
from tests.hosts.webui.host import Processing
from tests.hosts.webui.looks import PANEL, hooks, state_hash
from tests.hosts.webui.loras import INK, KNIGHT, PAIR

RANGE = re.compile(r"(\S+)-(\S+) \[(\d+)\]")


class AxisOption:
    def __init__(self, label, type, apply, format_value=None, confirm=None, cost=0.0, choices=None):
        self.label, self.type, self.apply, self.format_value = label, type, apply, format_value
        self.confirm, self.cost, self.choices = confirm, cost, choices


class Plot:
    """The script as the host has loaded it, and our extension beside it."""

    def __init__(self, web):
        self.web = web
        self.module = ModuleType("xyz_grid.py")
        self.module.AxisOption = AxisOption
        self.module.axis_options = [AxisOption("Nothing", str, None)]
        script = type("Script", (), {"__module__": "xyz_grid.py"})
        ours = SimpleNamespace(script_class=fakes.Script, module=ModuleType("est_lora.py"))
        loaded = SimpleNamespace(script_class=script, module=self.module)
        web.modules["modules.scripts"].scripts_data[:] = [ours, loaded]
        web.load_entry()

    def axis(self, key):
        (found,) = [option for option in self.module.axis_options if option.label == f"[EST] {BY_KEY[key].label}"]
        return found

    def values(self, p, key, *typed):
        """What is typed in, read and confirmed."""
        axis = self.axis(key)
        if axis.type == float:
            ranges = [(text, RANGE.fullmatch(text)) for text in typed]
            typed = [value for text, found in ranges for value in (_steps(*found.groups()) if found else [text])]
        values = [axis.type(value) for value in typed]
        axis.confirm(p, values)
        return values

    def labels(self, p, key, *typed):
        axis = self.axis(key)
        return [axis.format_value(p, axis, value) for value in self.values(p, key, *typed)]

    def cells(self, p, **typed):
        """The jobs of a grid, one for each value of the only axis, or one in which several axes have one value."""
        jobs = [p]
        for key, given in typed.items():
            values = self.values(p, key, *given)
            jobs = [copy.copy(job) for job in jobs for _ in values]
            for index, job in enumerate(jobs):
                self.axis(key).apply(job, values[index % len(values)], values)
        return jobs


def _steps(first, last, count):
    step = (float(last) - float(first)) / (int(count) - 1)
    return [float(first) + index * step for index in range(int(count))]


@pytest.fixture
def plot(web):
    return Plot(web)


def of_table(key):
    return BY_KEY[key].infotext


def test_each_is_entered_once(plot):
    labels = [f"[EST] {field.label}" for field in FIELDS if field.key in axes.KNOBS]
    assert len(labels) == len(axes.KNOBS)
    for _ in range(3):
        plot.web.load_entry()
        assert [option.label for option in plot.module.axis_options] == ["Nothing", *labels]
    after_reload = Plot(plot.web)
    assert [option.label for option in after_reload.module.axis_options] == ["Nothing", *labels]


def test_a_host_without_the_plot(web):
    found = web.modules["modules.scripts"].scripts_data
    assert found == []
    web.load_entry()
    found.append(SimpleNamespace(script_class=type("S", (), {"__module__": "xyz_grid.py"}), module=ModuleType("other")))
    web.load_entry()


def test_what_can_be_chosen(plot):
    for key in axes.KNOBS:
        choices = plot.axis(key).choices
        if key in ("subject", "style"):
            assert KNIGHT in choices()
            assert "None" not in choices()
            assert "pickled" not in choices()
        elif BY_KEY[key].choices:
            assert choices() == list(BY_KEY[key].choices)
        else:
            assert choices is None


def test_without_the_lora_extension(plot, monkeypatch):
    monkeypatch.delitem(sys.modules, "networks")
    assert plot.axis("style").choices() == []
    with pytest.raises(EstLoraError, match="Lora extension is disabled"):
        plot.values(Processing(plot.web), "style", INK)


@pytest.mark.parametrize(
    ("key", "typed", "values", "labels"),
    [
        ("lean", ["-1-1 [5]"], [-1, -0.5, 0, 0.5, 1], ["-1", "-0.5", "0", "0.5", "1"]),
        ("lean", ["-0.9-0.9 [7]"], [-0.9, -0.6, -0.3, 0, 0.3, 0.6, 0.9], None),
        ("alpha", ["0.1-0.7 [3]", "2.50"], [0.1, 0.4, 0.7, "2.50"], ["0.1", "0.4", "0.7", "2.5"]),
        ("beta", ["auto", "0-2 [3]"], ["auto", 0, 1, 2], ["auto", "0", "1", "2"]),
        ("subject_weight", ["1"], ["1"], ["1"]),
        ("method", ["est", "k-lora"], ["est", "k-lora"], ["est", "k-lora"]),
        ("pattern", ["s*"], ["s*"], ["s*"]),
    ],
)
def test_values_and_what_the_grid_says(plot, key, typed, values, labels):
    p = Processing(plot.web)
    assert plot.values(p, key, *typed) == values
    shown = [f"{key.replace('_', ' ')}: {text}" for text in labels or map(str, values)]
    assert plot.labels(p, key, *typed) == shown


def test_rounding_is_not_shown(plot):
    axis = plot.axis("lean")
    values = [axis.type(value) for value in (0.1 + 0.2, -2.2e-16, 1.0000000000000002)]
    axis.confirm(None, values)
    assert [axis.format_value(None, axis, value) for value in values] == ["lean: 0.3", "lean: 0", "lean: 1"]


def test_the_grid_names_files_by_their_stem(plot):
    plot.web.networks.available_networks[INK].read_hash()
    short = plot.web.networks.available_networks[INK].shorthash
    assert plot.labels(None, "style", INK, f"{INK} alias", f"#{short}") == [f"style: {INK}"] * 3


MISTAKES = [
    ("subject", [KNIGHT, "knigth"], "has no LoRA 'knigth': did you mean 'knight'"),
    ("style", ["pickled"], "is a pickle"),
    ("style", [""], "style can't be ''"),
    ("method", ["est", "est2"], "method can't be 'est2': it is one of est, k-lora"),
    ("lean", ["0", "much"], "lean can't be 'much': it is a number in -1 ... 1"),
    ("lean", ["-1-2 [4]"], "lean can't be '2.0'"),
    ("beta", ["Auto"], "beta can't be 'Auto': it is a number in 0 ... 2, or auto"),
    ("alpha", ["0"], "alpha can't be '0'"),
    ("hires", [], r"axis \[EST\] .* has no values"),
]


@pytest.mark.parametrize(("key", "typed", "sentence"), MISTAKES, ids=[f"{key}-{typed}" for key, typed, _ in MISTAKES])
def test_a_mistake_is_a_sentence_before_the_grid(plot, key, typed, sentence):
    with pytest.raises(EstLoraError, match=sentence):
        plot.values(Processing(plot.web), key, *typed)
    with pytest.raises(fakes.HTTPException, match=sentence) as refused:
        plot.values(Processing(plot.web, is_api=True), key, *typed)
    assert refused.value.status_code == 422


def test_cells_share_nothing_of_it(plot):
    p = Processing(plot.web)
    before = dict(vars(p))
    est, both = plot.cells(p, lean=["0.5"], method=["est", "sum"])
    assert axes.chosen(est) == {"lean": "0.5", "method": "est"}
    assert axes.chosen(both) == {"lean": "0.5", "method": "sum"}
    assert axes.chosen(p) == {}
    assert vars(p) == before


def test_an_axis_is_above_the_tag_and_the_tag_above_the_panel(plot):
    web = plot.web
    args = [{**PANEL, "lean": 0.1, "alpha": 2, "balance": "l1"}]
    p = Processing(web, f"a knight {PAIR[:-1]}:lean=0.2:alpha=3>", args=args)
    (cell,) = plot.cells(p, lean=["0.3"])
    told = web.make(cell)[0].infotext
    assert {key: told[of_table(key)] for key in ("lean", "alpha", "balance")} == {
        "lean": 0.3,
        "alpha": 3,
        "balance": "l1",
    }


def test_a_row_is_what_single_pictures_are(plot):
    web = plot.web
    methods = BY_KEY["method"].choices
    p = Processing(web, args=[PANEL])
    for method, cell in zip(methods, plot.cells(p, method=methods), strict=True):
        (made,) = web.make(cell)
        (single,) = web.make(Processing(web, args=[{**PANEL, "method": method}]))
        assert made.latent.equal(single.latent)
        assert made.infotext == single.infotext


def test_both_files_from_axes_alone(plot):
    web = plot.web
    (cell,) = plot.cells(Processing(web), subject=[KNIGHT], style=[INK])
    (wanted,) = web.make(Processing(web, args=[PANEL]))
    assert web.make(cell)[0].latent.equal(wanted.latent)
    of_panel = Processing(web, args=[True, "None", INK])
    (cell,) = plot.cells(of_panel, subject=[KNIGHT])
    assert web.make(cell)[0].latent.equal(wanted.latent)


def test_an_axis_without_files_is_a_sentence(plot):
    web = plot.web
    (plain,) = web.make(Processing(web))
    (cell,) = plot.cells(Processing(web), method=["est"])
    (made,) = web.make(cell)
    assert made.latent.equal(plain.latent)
    assert "no subject was given" in made.infotext["EST-LoRA off"]
    assert any("made without EST-LoRA" in sentence for sentence in cell.comments)


def test_hires(plot):
    web = plot.web
    p = Processing(web, args=[PANEL], enable_hr=True)
    (cell,) = plot.cells(p, hires=["off"])
    (wanted,) = web.make(Processing(web, args=[{**PANEL, "hires": "off"}], enable_hr=True))
    assert web.make(cell)[0].latent.equal(wanted.latent)


def test_a_cell_that_fails_leaves_nothing(plot):
    web = plot.web
    before = state_hash(web), hooks(web)
    (cell,) = plot.cells(Processing(web, fails_at=2), subject=[KNIGHT], style=[INK])
    with pytest.raises(RuntimeError, match="out of memory"):
        web.make(cell)
    assert (state_hash(web), hooks(web)) == before
