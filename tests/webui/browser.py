"""The WebUI's page in a browser without a window, worked as a person does: by what is seen, the mouse and the keyboard."""

from __future__ import annotations

import io
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import requests
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException, WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

T = TypeVar("T")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking")
_PATIENCE_S, _PATIENCE_OF_GRIDS_S = 60, 300


def start(width: int = 1400, height: int = 2600) -> webdriver.Chrome:
    """A browser; `Page` works it and `quit()` ends it."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (*_FLAGS, f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


class Page:
    """One tab of the WebUI with our panel. Components of the panel go by their keys, which end their identifiers.

    Attributes:
        driver: selenium's own, for what this class hasn't.
        tab: `txt2img` or `img2img`.
        png: the file of the last picture.
    """

    def __init__(self, driver: webdriver.Chrome, address: str, tab: str = "txt2img") -> None:
        self.driver = driver
        self.tab = tab
        self.png = b""
        self._address = address
        self._before: list[str] = []

    def open(self, tab: str | None = None, theme: str = "light") -> None:
        """Loads the page anew and goes to a tab."""
        self.tab = tab or self.tab
        self.driver.get(f"{self._address}/?__theme={theme}")
        # The host's own script puts the box into the panel's title, as one of its last deeds.
        self.until(lambda: self.find(f"{self.id('enabled')} .input-accordion-checkbox"), "the page is there")
        if self.tab != "txt2img":
            self.tab_of(self.tab)
            self.until(lambda: self.find(self.id("enabled")).is_displayed(), f"the tab {self.tab} is there")

    def id(self, key: str) -> str:
        """The selector of a part of our panel."""
        return f"#script_{self.tab}_estlora_{key}"

    def find(self, selector: str) -> WebElement:
        """The first element of a CSS selector, scrolled into view."""
        found = self.driver.find_element(By.CSS_SELECTOR, selector)
        self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", found)
        return found

    def run(self, script: str, *arguments: Any) -> Any:
        """Runs JavaScript in the page."""
        return self.driver.execute_script(script, *arguments)

    def until(self, condition: Callable[[], T], what: str, seconds: float = _PATIENCE_S) -> T:
        """Waits for something that is true, and returns it; what isn't there yet is waited for too."""
        deadline, why = time.monotonic() + seconds, ""
        while time.monotonic() < deadline:
            try:
                if found := condition():
                    return found
            except WebDriverException as error:
                why = f": {error.msg}"
            time.sleep(0.1)
        raise AssertionError(f"waited {seconds:g} s in vain until {what}{why}")

    # -- the panel

    def unfold(self, key: str = "enabled") -> None:
        """Opens the panel, which switches it on, or another accordion."""
        label = self.find(f"{self.id(key)} > .label-wrap")
        if "open" not in (label.get_attribute("class") or "").split():
            label.click()
        self.until(lambda: "open" in (label.get_attribute("class") or "").split(), f"{key} is open")

    def choose(self, key: str, text: str) -> None:
        """Chooses from a dropdown, or types what it hasn't."""
        field = self.find(f"{self.id(key)} input")
        field.click()
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)
        time.sleep(0.3)  # the list follows what is typed
        options = self.driver.find_elements(By.CSS_SELECTOR, f"{self.id(key)} ul.options > li")
        same = [option for option in options if option.text.removeprefix("✓").strip() == text]
        same[0].click() if same else field.send_keys(Keys.ENTER)
        field.send_keys(Keys.TAB)
        self.until(lambda: self.value(key) == text, f"{key} is {text}")

    def set(self, key: str, value: object) -> None:
        """Sets a knob: a number beside a slider, a text, one of several words, or (`True`, `False`) a box."""
        self._fill(self.find(self._of(key)), value)

    def _fill(self, part: WebElement, value: object) -> None:
        boxes = part.find_elements(By.CSS_SELECTOR, "input[type=checkbox]")
        if isinstance(value, bool) and boxes:
            if boxes[0].is_selected() != value:
                boxes[0].click()
            return
        if words := part.find_elements(By.CSS_SELECTOR, "input[type=radio]"):
            next(word for word in words if word.get_attribute("value") == value).click()
            return
        field = part.find_element(By.CSS_SELECTOR, "input[type=number], textarea, input[type=text]")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(str(value), Keys.TAB)

    def press(self, key: str) -> None:
        """Presses a button."""
        self.find(self.id(key)).click()

    def text(self, key: str) -> str:
        """What a part of the panel says."""
        return self.find(self.id(key)).text

    def value(self, key: str) -> str | bool:
        """What a knob is set to, as it is shown."""
        part = self.driver.find_element(By.CSS_SELECTOR, self._of(key))
        if words := part.find_elements(By.CSS_SELECTOR, "input[type=radio]"):
            return next((str(word.get_attribute("value")) for word in words if word.is_selected()), "")
        selector = "input[type=checkbox], input[type=number], textarea, input:not([type=range])"
        field = part.find_element(By.CSS_SELECTOR, selector)
        return field.is_selected() if field.get_attribute("type") == "checkbox" else str(field.get_property("value"))

    def _of(self, key: str) -> str:
        """The selector of what holds a knob's input; the switch is in the panel's title."""
        return self.id(key) + (" > .label-wrap" if key == "enabled" else "")

    # -- the host's page

    @property
    def prompt(self) -> str:
        """The prompt."""
        return str(self.driver.find_element(By.CSS_SELECTOR, f"#{self.tab}_prompt textarea").get_property("value"))

    @prompt.setter
    def prompt(self, text: str) -> None:
        field = self.find(f"#{self.tab}_prompt textarea")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text or Keys.DELETE)

    def host(self, name: str, value: object) -> None:
        """Sets a number of the host's page: `steps`, `width`, `seed`, ..."""
        field = self.find(f"#{self.tab}_{name} input[type=number]")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(str(value), Keys.TAB)
        if name in ("width", "height"):  # A1111's own page throws then, also where nobody has extended it
            time.sleep(1)
            self.driver.get_log("browser")

    def tab_of(self, words: str) -> None:
        """Goes to one of the host's tabs by its name."""
        tabs = self.driver.find_elements(By.CSS_SELECTOR, "#tabs > .tab-nav > button")
        next(button for button in tabs if button.text.strip().lower() == words.lower()).click()

    def settings(self, section: str) -> None:
        """Goes to a section of the host's settings by its name."""
        self.tab_of("Settings")
        sections = "#settings > .tab-nav > button"
        self.until(lambda: self.is_there(sections), "the settings are there")
        buttons = self.driver.find_elements(By.CSS_SELECTOR, sections)
        next(button for button in buttons if button.text.strip() == section).click()

    def apply_settings(self, **values: object) -> None:
        """Sets some of the section that is shown, by their keys, and applies them."""
        for key, value in values.items():
            self._fill(self.find(f"#setting_{key}"), value)
        self.click("#settings_submit")
        self.until(lambda: "settings changed" in self.find("#settings_result").text, "they are applied")

    def paste(self, infotext: str) -> None:
        """Has the host read parameters from the prompt."""
        field = self.find(f"#{self.tab}_prompt textarea")
        # As a person pastes: typed, a line break would be one thing and a comma another.
        self.run("arguments[0].value = arguments[1]; updateInput(arguments[0])", field, infotext)
        self.click(f"#{self.tab}_tools #paste")

    def grid(self, x: str, xs: str, y: str, ys: str) -> None:
        """Fills the host's X/Y/Z plot, by text."""
        self.pick("#script_list", "X/Y/Z plot")
        prefix = f"#script_{self.tab}_xyz_plot_"
        self.click(f"{prefix}csv_mode input")
        for axis, label, values in (("x", x, xs), ("y", y, ys)):
            self.pick(f"{prefix}{axis}_type", label)
            field = self.until(lambda axis=axis: self.find(f"{prefix}{axis}_values textarea"), "values can be typed")
            field.send_keys(Keys.CONTROL, "a")
            field.send_keys(values)

    def pick(self, selector: str, text: str) -> None:
        """Chooses from any dropdown what it has."""
        field = self.find(f"{selector} input")
        field.click()
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)
        options = f"{selector} ul.options > li"
        option = self.until(
            lambda: next(
                one
                for one in [*self.driver.find_elements(By.CSS_SELECTOR, options), None]
                if one is None or one.text.removeprefix("✓").strip() == text
            ),
            f"{text} can be chosen",
        )
        option.click()

    def click(self, selector: str) -> None:
        """Clicks any element."""
        self.until(lambda: self.find(selector).is_displayed(), f"{selector} is seen")
        self.find(selector).click()

    def draw(self) -> np.ndarray:
        """Presses Generate and returns the (first) picture, as integers."""
        self.begin()
        return self.picture()

    def begin(self) -> None:
        """Presses Generate."""
        self._before = self._sources()
        self.click(f"#{self.tab}_generate")

    def picture(self) -> np.ndarray:
        """Waits for the (first) picture since `begin`."""
        self.until(lambda: set(self._sources()) - set(self._before), "there is a picture", _PATIENCE_OF_GRIDS_S)
        self.until(lambda: not self.is_there(f"#{self.tab}_interrupt"), "it is done")
        source = self.until(self._sources, "the picture is there")[0]
        self.png = requests.get(source, timeout=_PATIENCE_S).content
        return np.asarray(Image.open(io.BytesIO(self.png)).convert("RGB")).astype(int)

    def _sources(self) -> list[str]:
        return self.run(f"return [...document.querySelectorAll('#{self.tab}_gallery img')].map(image => image.src)")

    @property
    def infotext(self) -> str:
        """The parameters under the picture."""
        return self.find(f"#html_info_{self.tab}").text

    def screenshot(self, path: str | Path, selector: str | None = None) -> None:
        """Saves a PNG of the window, or of one element."""
        if selector:
            self.find(selector).screenshot(str(path))
        else:
            self.driver.save_screenshot(str(path))

    def console_errors(self) -> list[str]:
        """The errors of the browser's console since the last call, but for files of other servers that don't answer."""
        said = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        return [one for one in said if not (re.match("https?:", one) and not one.startswith(self._address))]

    def is_there(self, selector: str) -> bool:
        """Whether an element is there and seen."""
        try:
            return self.driver.find_element(By.CSS_SELECTOR, selector).is_displayed()
        except NoSuchElementException:
            return False
