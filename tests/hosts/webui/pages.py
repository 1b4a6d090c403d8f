"""A page of the host with the panel on it, and somebody who uses it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.hosts.webui.fakes import Component, read_infotext
from tests.hosts.webui.host import WebUI

_OF_THE_HOST = {"prompt": "a knight", "sampling": "Euler", "scheduler": "Automatic", "steps": 4}
_OF_IMG2IMG = {"denoising_strength": 0.5}


class Page:
    """One tab. Components are called by the ends of their identifiers, buttons by their words."""

    def __init__(self, web: WebUI, tab: str = "txt2img", missing: tuple[str, ...] = ()) -> None:
        """Builds it but for the components `missing` of the host."""
        self._web, self._tab = web, tab
        self._context = web.modules["gradio"].Context
        self._context.root_block = SimpleNamespace(blocks={})
        self.components: dict[str, Component] = {}
        web.script.is_img2img = tab == "img2img"
        own = _OF_THE_HOST | (_OF_IMG2IMG if tab == "img2img" else {})
        first = len(web.components)
        for name in own.keys() - set(missing):
            self.make(name)
        self.drawn = web.script.ui(web.script.is_img2img)
        for made in web.components[first:]:
            prefix, _, name = (getattr(made, "elem_id", None) or "").partition("_estlora_")
            if prefix == f"script_{tab}":
                self.components[name] = made

    def make(self, name: str) -> Component:
        """The host makes a component."""
        value = (_OF_THE_HOST | _OF_IMG2IMG).get(name)
        elem_id = f"{self._tab}_{name}"
        made = self._web.modules["gradio"].Textbox(value=value, elem_id=elem_id)
        self._web.script.after_component(made, elem_id=elem_id)
        self.components[name] = made
        return made

    def __getitem__(self, name: str) -> Any:
        return self.components[name].value

    def values(self) -> dict[str, Any]:
        """What is in every component."""
        return {name: made.value for name, made in self.components.items() if hasattr(made, "value")}

    def set(self, **values: Any) -> None:
        """The user types or chooses."""
        for name, value in values.items():
            self._put(self.components[name], value)

    def press(self, words: str, picked: str | None = None) -> None:
        """The user presses a button; `picked` is what the page's script makes of a button that is its own."""
        (button,) = [made for made in self.components.values() if made.kind == "Button" and made.args[0] == words]
        self._run(button.events["click"], picked)

    def paste(self, infotext: str) -> None:
        """The user has the host read the parameters of a picture."""
        parameters = read_infotext(infotext)
        self._web.callbacks.call("on_infotext_pasted", infotext, parameters)
        self.set(prompt=parameters["Prompt"])
        for component, value_of in self._web.script.infotext_fields:
            if (value := value_of(parameters)) is not None:
                self._put(component, type(component.value)(value))

    def happen(self, name: str, first: int = 0, last: int | None = None) -> None:
        """A component says that it has changed; some of what follows."""
        self._run(self.components[name].events["change"][first:last])

    def _run(self, chain: list[dict[str, Any]], picked: str | None = None) -> None:
        for event in chain:
            given = [part.value for part in event["inputs"]]
            if event.get("_js") == "estLoraPicked":
                given[0] = picked
            answer = event["fn"](*given)
            outputs = event["outputs"]
            answers = [answer] if len(outputs) == 1 and not isinstance(answer, (list, tuple)) else answer or []
            assert len(answers) == len(outputs)
            for part, changed in zip(outputs, answers):
                if not isinstance(changed, dict):
                    self._put(part, changed)
                    continue
                changes = {key: value for key, value in changed.items() if key != "__type__"}
                value = changes.pop("value", part.value)
                vars(part).update(changes)
                self._put(part, value)

    def _put(self, part: Component, value: Any) -> None:
        has_changed = part.value != value
        part.value = value
        if has_changed:
            self._run(part.events.get("change", []))
