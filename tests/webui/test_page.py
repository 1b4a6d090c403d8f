"""The panel, worked in a browser: what a person sees and does, and that the picture is the one it promises."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest

from tests.extractors import write_dino
from tests.webui.pictures import est, pair
from tests.webui.settings import settings

Page = pytest.importorskip("tests.webui.browser", reason="the page is tested with selenium: pip install selenium").Page

SMALL = {"steps": 4, "width": 64, "height": 64, "seed": 1}
KNOBS = {"lean": -0.25, "style_weight": 0.8}


@pytest.fixture
def shoot(request, page, webui):
    """Takes a screenshot of the panel, where somebody wants some."""
    folder = request.config.getoption("--webui-shots")
    host = "forge" if webui.is_forge else "a1111"

    def take(name, selector=None):
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            page.screenshot(Path(folder, f"{host}-{page.tab}-{name}.png"), selector or page.id("enabled"))

    return take


@pytest.fixture
def chosen(page, webui, sd15):
    """The page with a pair chosen and small pictures asked for."""
    names = pair(webui)
    fill(page, names)
    return names


def fill(page, names):
    page.prompt = "a red cat"
    for name, value in SMALL.items():
        page.host(name, value)
    page.unfold()
    page.press("refresh")
    for key, name in zip(("subject", "style"), names):
        page.choose(key, name)
    page.until(lambda: page.is_there(f"{page.id('map')} svg"), "the map is drawn")


def of_api(page, webui, names, **knobs):
    """What the API draws with the settings of the page's last picture."""
    used = dict(re.findall(r"(Sampler|Schedule type|CFG scale): ([^,]+)", page.infotext))
    sampler = {"sampler_name": used["Sampler"], "cfg_scale": float(used["CFG scale"])}
    return webui.picture(
        "a red cat", est=est(*names, **knobs), scheduler=used.get("Schedule type", "Automatic"), **SMALL, **sampler
    )


def tag(page):
    return page.prompt.partition(" <est:")[2]


def drawn(page):
    return page.find(page.id("map")).get_attribute("innerHTML")


def redrawn(page, before):
    page.until(lambda: drawn(page) != before, "the map is drawn anew")


def test_panel_tag_and_api_make_one_picture(page, webui, chosen, shoot):
    for key, value in KNOBS.items():
        page.set(key, value)
    by_panel = page.draw()
    shoot("panel")
    assert np.array_equal(by_panel, of_api(page, webui, chosen, **KNOBS))
    assert not np.array_equal(by_panel, of_api(page, webui, chosen))
    page.press("insert_tag")
    page.until(lambda: tag(page), "the tag is in the prompt")
    page.set("enabled", False)
    assert np.array_equal(page.draw(), by_panel)


def test_the_tag_comes_back(page, chosen):
    page.set("lean", -0.25)
    page.set("enabled", True)
    page.press("insert_tag")
    page.until(lambda: tag(page), "the tag is in the prompt")
    page.set("lean", 0.5)
    page.press("exchange")
    page.until(lambda: page.value("subject") == chosen[1], "they are exchanged")
    page.press("read_tag")
    page.until(lambda: page.value("lean") == "-0.25", "the panel has it")
    assert page.prompt == "a red cat"
    assert (page.value("subject"), page.value("style")) == chosen


def test_the_map_follows_what_is_chosen(page, chosen, shoot):
    for change in (
        lambda: page.set("lean", 0.5),
        lambda: page.host("steps", 9),
        lambda: page.set("lean", -1),
        lambda: page.press("exchange"),
    ):
        before = drawn(page)
        change()
        redrawn(page, before)
    page.unfold("advanced")
    page.set("method", "sum")
    page.until(lambda: "use both throughout" in page.text("map"), "the map is of the sum")
    shoot("advanced")


def test_a_folded_panel_asks_for_no_map(page):
    time.sleep(2)  # the page reports changes of every knob while it loads
    assert not page.text("map")
    page.unfold()
    page.until(lambda: "Choose a subject and a style" in page.text("map"), "it is drawn")


def test_what_is_wrong_is_said_in_the_panel(page, chosen):
    page.choose("style", "nothing like it")
    page.until(lambda: "no LoRA 'nothing like it'" in page.text("map"), "it is said")
    assert not page.is_there(f"{page.id('map')} svg")
    page.press("read_tag")
    page.until(lambda: "no <est:...> tag" in page.text("said"), "it is said")


@pytest.mark.parametrize("is_renamed", [False, True])
def test_a_picture_finds_its_way_back(page, webui, chosen, is_renamed, tmp_path):
    page.set("lean", -0.25)
    page.press("insert_tag")
    page.until(lambda: tag(page), "the tag is in the prompt")
    picture = page.draw()
    (tmp_path / "picture.png").write_bytes(page.png)
    names = chosen
    old = webui.loras / f"{chosen[0]}.safetensors"
    if is_renamed:
        names = (f"{chosen[0]}-renamed", chosen[1])
        old.rename(old.with_stem(names[0]))
        webui.post("refresh-loras", {})
    try:
        page.open()
        page.tab_of("PNG Info")
        page.find("#pnginfo_image input[type=file]").send_keys(str(tmp_path / "picture.png"))
        page.until(lambda: "EST-LoRA" in page.find("#tab_pnginfo").text, "it is read")
        page.click("#tab_pnginfo #txt2img_tab")
        page.until(lambda: page.value("subject") == names[0], "the subject is there")
        assert page.value("style") == names[1]
        assert page.value("lean") == "-0.25"
        assert page.value("enabled") is True
        assert tag(page).startswith(":".join(names))
        assert np.array_equal(page.draw(), picture)
    finally:
        if is_renamed:
            old.with_stem(names[0]).rename(old)
            webui.post("refresh-loras", {})


def test_parameters_are_pasted_over_everything(page, chosen):
    page.set("style_weight", 0.5)
    page.draw()
    infotext = page.infotext
    page.set("style_weight", 1.5)
    page.set("lean", 0.5)
    page.paste(infotext)
    page.until(lambda: page.value("style_weight") == "0.5", "it is pasted")
    assert page.value("lean") == "0"
    page.paste("a red cat\nSteps: 4, Sampler: Euler, Seed: 1")
    page.until(lambda: page.value("enabled") is False, "it is switched off")
    assert page.value("subject") == chosen[0]


def test_to_the_other_tab_and_each_with_its_own_state(page, chosen):
    page.set("lean", -0.25)
    page.draw()
    page.click("#txt2img_send_to_img2img")
    page.tab = "img2img"
    page.until(lambda: page.value("subject") == chosen[0], "img2img has it")
    assert page.value("lean") == "-0.25"
    page.set("lean", 0.75)
    page.tab = "txt2img"
    assert page.value("lean") == "-0.25"


def test_two_windows_at_once_know_nothing_of_each_other(page, webui, chosen):
    driver = page.driver
    page.set("lean", -0.25)
    first = driver.current_window_handle
    driver.switch_to.new_window("window")
    second = driver.current_window_handle
    try:
        other = Page(driver, webui.address)
        other.open()
        fill(other, chosen)
        other.set("lean", 0.75)
        driver.switch_to.window(first)
        page.begin()
        driver.switch_to.window(second)
        other.begin()
        of_second = other.picture()
        driver.close()
    finally:
        driver.switch_to.window(first)
    assert np.array_equal(page.picture(), of_api(page, webui, chosen, lean=-0.25))
    assert np.array_equal(of_second, of_api(page, webui, chosen, lean=0.75))
    assert page.value("lean") == "-0.25"


def test_presets(page, chosen):
    page.set("lean", -0.25)
    page.choose("preset", "for a test")
    page.press("save")
    page.until(lambda: "Saved as for a test" in page.text("said"), "it is saved")
    page.set("lean", 1)
    page.press("exchange")
    page.press("load")
    page.until(lambda: page.value("lean") == "-0.25", "it is loaded")
    assert page.value("subject") == chosen[0]
    page.press("delete")
    page.until(lambda: "forgotten" in page.text("said"), "it is deleted")


@pytest.fixture
def lossless(webui):
    """Grids as they are: Forge Neo makes a JPEG of them."""
    before = webui.api.get_options()["grid_format"]
    webui.api.set_options({"grid_format": "png"})
    yield
    webui.api.set_options({"grid_format": before})


def test_a_grid_over_methods(page, webui, chosen, shoot, lossless):
    page.grid("[EST] Method", "est, k-lora, sum, subject, style", "[EST] Lean", "-0.5, 0, 0.5")
    grid = page.draw()
    assert grid.shape[0] > 3 * 64
    assert grid.shape[1] > 5 * 64
    shoot("grid", "#txt2img_gallery")
    plain = of_api(page, webui, chosen, method="sum")
    assert any(
        np.array_equal(grid[y : y + 64, x : x + 64], plain) for y, x in np.ndindex(*(np.array(grid.shape[:2]) - 63))
    )


@pytest.mark.parametrize(("theme", "width"), [("light", 1400), ("dark", 1400), ("light", 420), ("dark", 420)])
def test_how_it_looks(page, webui, sd15, shoot, theme, width):
    page.driver.set_window_size(width, 2600)
    try:
        page.open(theme=theme)
        fill(page, pair(webui))
        panel = page.find(page.id("enabled"))
        shoot(f"{theme}-{width}")
        assert page.run("return arguments[0].scrollWidth <= arguments[0].clientWidth + 1", panel)
    finally:
        page.driver.set_window_size(1400, 2600)


class TestDiscrepancy:
    """The style discrepancy in the panel."""

    @pytest.fixture
    def measured(self, webui, chosen, page, tmp_path):
        """The panel with a pair that is to be measured, in a moment."""
        write_dino(tmp_path)
        with settings(webui, extractor_folder=str(tmp_path), probe_side=64, probe_steps=3):
            page.set("beta_kind", "measured")
            page.until(lambda: "measures its style discrepancy" in page.text("known"), "it is said that it isn't known")
            yield page

    def test_it_is_measured_shown_and_used(self, measured, webui, chosen, shoot):
        page, before = measured, drawn(measured)
        page.press("measure_now")
        page.until(lambda: "The style discrepancy is" in page.text("said"), "it is measured")
        page.until(lambda: page.is_there(f"{page.id('known')} img"), "the pictures are there")
        redrawn(page, before)
        shoot("measured")
        picture = page.draw()
        number = re.search(r"EST-LoRA beta: ([\d.]+)", page.infotext)[1]
        assert f"{float(number):.3g}" in page.text("known")
        page.set("beta_kind", "fixed")
        page.until(lambda: page.is_there(page.id("beta_number")), "a number can be set")
        page.until(lambda: not page.text("known"), "the measured number counts no more")
        assert np.array_equal(picture, of_api(page, webui, chosen, beta=float(number)))

    def test_the_first_picture_measures_too(self, measured):
        measured.draw()
        measured.set("lean", 0.5)
        measured.until(lambda: measured.is_there(f"{measured.id('known')} img"), "the pictures are there")

    def test_a_number_goes_round(self, measured):
        page = measured
        page.set("beta_kind", "fixed")
        page.until(lambda: page.is_there(page.id("beta_number")), "a number can be set")
        page.set("beta_number", 0.85)
        page.until(lambda: page.value("beta") == "0.85", "the knob has it")
        page.press("insert_tag")
        page.until(lambda: ":beta=0.85" in page.prompt, "the tag has it")
        page.set("beta_kind", "measured")
        page.until(lambda: page.value("beta") == "auto", "the knob has it")
        page.press("read_tag")
        page.until(lambda: page.value("beta_kind") == "fixed", "the panel has it")
        assert float(page.value("beta_number")) == 0.85

    def test_it_can_be_cancelled(self, measured, webui):
        with settings(webui, probe_steps=100, probe_side=256):
            measured.press("measure_now")
            time.sleep(2)
            measured.press("cancel")
            measured.until(lambda: "It wasn't measured" in measured.text("said"), "it has ended")
        assert not measured.is_there(f"{measured.id('known')} img")
