"""What the page's own script does: buttons on the cards of the Lora tab; and a panel for every eye, ear and hand."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("selenium", reason="the page is tested with selenium: pip install selenium")

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

PAIR = ".est-lora-card-buttons"
KNOBS = ":is(input, button, textarea, select, [role=button])"

# The lowest contrast of a text to what is behind it (WCAG 2's ratio), with the text; gradients count by their worst end.
CONTRAST = """
const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
const over = ([r, g, b, a = 1], [x, y, z]) => [r * a + x * (1 - a), g * a + y * (1 - a), b * a + z * (1 - a)];
const light = (rgb) => {
    const [r, g, b] = rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
function behind(part) {
    if (!part) return [[255, 255, 255]];
    const style = getComputedStyle(part);
    const ends = style.backgroundImage.match(/rgba?\\([^)]*\\)/g);
    const layers = ends ? ends.map(numbers) : [numbers(style.backgroundColor)];
    return layers.flatMap((layer) => ((layer[3] ?? 1) === 1 ? [layer] : behind(part.parentElement).map((b) => over(layer, b))));
}
let worst = [99, ""];
for (const part of document.querySelector(arguments[0]).querySelectorAll("*")) {
    const own = [...part.childNodes].filter((n) => n.nodeType === 3 && n.data.trim()).map((n) => n.data.trim()).join(" ");
    const text = own || (part.matches("input:not([type=checkbox], [type=radio], [type=range])") && part.value);
    if (!text || !part.getClientRects().length) continue;
    const style = getComputedStyle(part);
    const colour = numbers(part.closest("svg") ? style.fill : style.color);
    for (const back of behind(part)) {
        const found = ratio(light(over(colour, back)), light(back.slice(0, 3)));
        if (found < worst[0]) worst = [found, text];
    }
}
return worst;
"""


@pytest.fixture(scope="module")
def names(webui):
    """A subject and a style in the Lora tab, and a pickle beside them."""
    webui.use("sd15")
    pickle = webui.loras / "estlora-test-old.pt"
    found = webui.lora("subject"), webui.lora("style")
    pickle.write_bytes(b"")
    webui.post("refresh-loras", {})
    yield found
    pickle.unlink()


@pytest.fixture(params=["txt2img", "img2img"])
def cards(request, names, page):
    """The Lora tab."""
    page.open(request.param)
    go_to(page, "Lora")
    refresh = f"#{page.tab}_lora_extra_refresh"
    page.until(lambda: page.is_there(refresh), "the tab is there")
    page.find(refresh).click()  # the host keeps the cards that it has made
    page.until(lambda: page.is_there(card_of(page, names[0])), "the cards are there")
    return page


@pytest.fixture(params=["light", "dark"])
def panel(request, names, page):
    """The panel with everything open and both LoRAs chosen."""
    page.open(theme=request.param)
    page.unfold()
    for key, name in zip(("subject", "style"), names):
        page.choose(key, name)
    page.unfold("advanced")
    page.until(lambda: page.is_there(f"{page.id('map')} svg"), "the map is drawn")
    return page


def go_to(page, title):
    buttons = page.driver.find_elements(By.CSS_SELECTOR, f"#{page.tab}_extra_tabs > .tab-nav > button")
    next(button for button in buttons if button.text.strip() == title).click()


def card_of(page, name):
    return f'#{page.tab}_lora_cards .card[data-name="{name}"]'


def point_at(page, name):
    ActionChains(page.driver).move_to_element(page.find(card_of(page, name))).perform()


def use(page, name, role):
    point_at(page, name)
    page.find(f"{card_of(page, name)} {PAIR} [data-role={role}]").click()
    page.until(lambda: page.value(role) == name, f"{name} is the {role}")


def keys(page, *pressed):
    ActionChains(page.driver).send_keys(*pressed).perform()
    return page.driver.switch_to.active_element


def test_a_card_goes_into_the_panel(cards, names):
    subject, style = names
    use(cards, subject, "subject")
    assert cards.value("enabled") is False
    use(cards, style, "style")
    cards.until(lambda: cards.value("enabled"), "the panel is switched on")
    assert cards.value("subject") == subject
    assert cards.prompt == ""
    go_to(cards, "Generation")
    cards.until(lambda: cards.text("said") == f"{style} is the style.", "the panel says so")


def test_the_card_says_that_it_was_taken(cards, names):
    point_at(cards, names[1])
    cards.find(f"{PAIR} [data-role=style]").click()
    cards.until(lambda: "style" in cards.driver.find_element(By.CSS_SELECTOR, f"{PAIR} [role=status]").text, "it says")


def test_a_pickle_has_no_buttons(cards, names):
    point_at(cards, names[0])
    point_at(cards, "estlora-test-old")
    assert not cards.is_there(f"{card_of(cards, 'estlora-test-old')} {PAIR}")


def test_cards_by_keyboard(cards, names):
    cards.find(f"#{cards.tab}_lora_extra_search").send_keys("estlora-test")
    focused = keys(cards, Keys.TAB)
    for _ in range(20):  # the host's buttons of folders come first
        if focused.get_attribute("data-role"):
            break
        focused = keys(cards, Keys.TAB)
    assert focused.get_attribute("data-role") == "subject"
    first = focused.accessible_name
    focused = keys(cards, Keys.ARROW_RIGHT)
    second = focused.accessible_name
    assert first != second
    assert all(re.fullmatch(r"Use estlora-test-\S+ as EST-LoRA's subject", said) for said in (first, second))
    keys(cards, Keys.ENTER)
    cards.until(lambda: str(cards.value("subject")) in second, "the second is the subject")
    assert keys(cards, Keys.TAB).get_attribute("data-role") == "style"


def test_every_part_has_a_name(panel):
    parts = panel.driver.find_elements(By.CSS_SELECTOR, f"{panel.id('enabled')} {KNOBS}")
    shown = [part for part in parts if part.is_displayed()]
    assert len(shown) > 30
    assert [part.get_attribute("outerHTML") for part in shown if not any(map(str.isalpha, part.accessible_name))] == []
    groups = panel.driver.find_elements(By.CSS_SELECTOR, f"{panel.id('enabled')} fieldset")
    assert all(group.accessible_name for group in groups)


def test_every_button_says_what_it_does(panel):
    for key in ("refresh", "exchange", "insert_tag", "read_tag", "load", "save", "delete"):
        panel.until(lambda key=key: panel.find(panel.id(key)).get_attribute("title"), f"{key} has a tooltip")


def test_what_is_hidden_is_hidden_from_all(panel):
    said = str(panel.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {}))
    assert "Insert tag" in said
    assert "Use the card as" not in said


def test_tab_goes_through_the_panel_in_order(panel):
    keys_of = "return document.activeElement.closest('[id*=\"_estlora_\"]')?.id.split('_estlora_')[1]"
    panel.set("beta_kind", "measured")  # after Reload UI it is what the settings say, and for the tests they do
    panel.until(lambda: not panel.is_there(panel.id("beta_number")), "no number is asked for")
    panel.run("document.querySelector(arguments[0]).focus()", f"{panel.id('enabled')}-visible-checkbox")
    met = []
    for _ in range(80):
        keys(panel, Keys.TAB)
        if panel.run("return document.activeElement === document.body"):
            continue  # the open list of a dropdown, where it can be scrolled, is a stop of its own and gone by then
        if (key := panel.run(keys_of)) is None:
            break
        met.append(key)
    met = list(dict.fromkeys(key for key in met if key != "enabled"))
    files = ["subject", "style", "refresh", "exchange", "insert_tag", "read_tag"]
    assert met[:10] == [*files, "lean", "subject_weight", "style_weight", "beta_kind"]
    assert met[10:12] == ["measure_now", "cancel"]
    assert met[12:15] == ["advanced", "method", "alpha"]
    assert met[-4:] == ["preset", "load", "save", "delete"]


def test_the_panel_by_keyboard_alone(page, names):
    page.find(f"{page.id('enabled')} .input-accordion-checkbox").send_keys(Keys.SPACE)
    page.until(lambda: page.value("enabled"), "the panel is on")
    handle = "(document.querySelector(arguments[0]).matches('button') ? document.querySelector(arguments[0]) :"
    handle = f"return {handle} document.querySelector(arguments[0] + ' > .icon'))"
    for key in ("enabled", "advanced"):
        title = page.run(handle, f"{page.id(key)} > .label-wrap")
        if title.get_attribute("aria-expanded") != "true":
            title.send_keys(Keys.ENTER)
        page.until(lambda title=title: title.get_attribute("aria-expanded") == "true", f"{key} is open")
    field = page.find(f"{page.id('subject')} input")
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(names[0], Keys.ENTER, Keys.TAB)
    page.until(lambda: page.value("subject") == names[0], "the subject is chosen")
    page.find(f"{page.id('lean')} input[type=range]").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    page.until(lambda: page.value("lean") == "0.1", "the slider has moved")
    page.find(f"{page.id('method')} input[value='k-lora']").send_keys(Keys.SPACE)
    page.until(lambda: page.value("method") == "k-lora", "the method is chosen")
    page.find(page.id("exchange")).send_keys(Keys.ENTER)
    page.until(lambda: page.value("style") == names[0], "they are exchanged")


def test_contrast(panel):
    panel.press("delete")  # without a name beside: there is an error to read
    panel.until(lambda: panel.text("said"), "it says something")
    ratio, text = panel.run(CONTRAST, panel.id("enabled"))
    assert ratio >= 4.5, text


def test_the_contrast_of_the_cards_buttons(cards, names):
    point_at(cards, names[0])
    ratio, text = cards.run(CONTRAST, PAIR)
    assert ratio >= 4.5, text


def test_nothing_is_wider_than_a_phone(panel):
    too_wide = """
        const panel = document.querySelector(arguments[0]);
        const end = Math.min(panel.getBoundingClientRect().right, innerWidth) + 0.5;
        return [...panel.querySelectorAll("*")].filter((part) => part.getClientRects().length
            && part.getBoundingClientRect().right > end).length;"""
    phone = {"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    panel.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:  # the host's own script sets its columns anew, in its time
        panel.until(lambda: panel.run(too_wide, panel.id("enabled")) == 0, "all is within the panel and the screen")
    finally:
        panel.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
