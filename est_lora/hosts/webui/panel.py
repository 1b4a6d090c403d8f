"""The panel: a switch, two LoRAs, every knob, and what they will do. What it hands over is read here too."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from est_lora.config import AUTO, BETA_UNMEASURED, BY_KEY, FIELDS, FILES, FusionConfig
from est_lora.errors import EstLoraError, explained
from est_lora.hosts.webui import measuring, request, settings
from est_lora.hosts.webui.loras import LoraList
from est_lora.hosts.webui.paste import NOTHING, Pasted, shown
from est_lora.hosts.webui.plans import Plans
from est_lora.hosts.webui.preview import Drawn, Preview, cards, say
from est_lora.hosts.webui.steps import Sampling
from est_lora.text import tag
from est_lora.text.presets import Presets

TITLE = "EST-LoRA"
KNOBS = tuple(field.key for field in FIELDS)
_FOLDED = (
    ("method",),
    ("alpha",),
    ("balance", "pattern"),
    ("clock", "layers"),
    ("other", "hires"),
    ("subject_te", "style_te"),
    ("engine",),
)
# What of the host's own page the map depends on, by the ends of the identifiers.
_OF_PAGE = ("prompt", "sampling", "scheduler", "steps")
_OF_IMG2IMG = ("denoising_strength",)
_BUTTONS = ["est-lora-buttons"]
_PAUSE_S = 0.1
_AT_ONCE = {"show_progress": False, "queue": False}  # pictures may be waiting in the queue
_MEASURED, _FIXED = "measured", "fixed"
_STEP = 0.01
_EXCHANGED = (FILES, ("subject_weight", "style_weight"), ("subject_te", "style_te"))


class Panel:
    """The panel of one tab.

    Attributes:
        knobs: its components by the keys of the knobs; empty before `build`.
    """

    def __init__(self, plans: Plans) -> None:
        """Takes what the pictures of the tab have read and planned."""
        self.knobs: dict[str, Any] = {}
        self._page: dict[str, Any] = {}
        self._preview = Preview(plans)
        self._is_wired = False

    def build(self, script: Any) -> list[Any]:
        """Draws the panel; returns its components in the order of `KNOBS`."""
        import gradio as gr
        from modules.ui_components import InputAccordion

        self._is_wired = False
        self._script = script
        self._tab = "img2img" if script.is_img2img else "txt2img"
        draw = _Drawing(gr, script, settings.defaults())
        with InputAccordion(value=False, label=TITLE, elem_id=script.elem_id("enabled")) as enabled:
            self.knobs = {"enabled": enabled}
            names, why_none = _lora_list()
            self._draw_files(draw, [NOTHING, *names])
            with gr.Row(elem_classes=_BUTTONS):
                self._exchange = draw.button("Exchange", "Exchanges the two LoRAs, with their strengths")
                self._insert = draw.button(
                    "Insert tag", "Puts the tag that means the same as this panel into the prompt"
                )
                self._read = draw.button("Read tag", "Takes the tag out of the prompt and sets this panel by it")
            self._said = gr.HTML("", elem_id=script.elem_id("said"))
            self.knobs["lean"] = draw.knob("lean")
            with gr.Row():
                self.knobs |= {key: draw.knob(key) for key in ("subject_weight", "style_weight")}
            self._draw_discrepancy(draw)
            self._map = gr.HTML(say(why_none, is_error=True), elem_id=script.elem_id("map"))
            with gr.Accordion("Advanced", open=False, elem_id=script.elem_id("advanced")):
                for row in _FOLDED:
                    with gr.Row():
                        self.knobs |= {key: draw.knob(key) for key in row}
            self._draw_presets(draw)
            self._drawn = gr.State(Drawn())
            self._connect(draw)
        components = [self.knobs[key] for key in KNOBS]
        pasted = [Pasted(key) for key in KNOBS]
        script.infotext_fields = list(zip(components, pasted))
        script.paste_field_names = pasted
        self._wire()
        return components

    def meet(self, component: Any, elem_id: str | None) -> None:
        """A component of the host's page has been made; the map needs a few of them, which may come after the panel."""
        tab, _, name = (elem_id or "").partition("_")
        if tab in ("txt2img", "img2img") and name in (*_OF_PAGE, *_OF_IMG2IMG):
            self._page[name] = component
            self._wire()

    # -- drawing

    def _draw_files(self, draw: _Drawing, names: list[str]) -> None:
        from modules.ui_common import create_refresh_button

        with draw.gr.Row():
            self.knobs |= {key: draw.file(key, names) for key in FILES}
            create_refresh_button([self.knobs[key] for key in FILES], _refresh, _choices, draw.id("refresh"))
        self._cards = draw.gr.HTML("", elem_id=draw.id("cards"))

    def _draw_discrepancy(self, draw: _Drawing) -> None:
        """Measured, or a number; the knob itself is a text out of sight, which all that sets knobs sets too."""
        field, value = BY_KEY["beta"], draw.default("beta")
        with draw.gr.Row():
            self._kind = draw.own(
                draw.gr.Radio(
                    choices=[_MEASURED, _FIXED],
                    value=_kind(value),
                    label="Style discrepancy",
                    info=field.help,
                    elem_id=draw.id("beta_kind"),
                )
            )
            self._number = draw.own(
                draw.gr.Slider(
                    minimum=field.low,
                    maximum=field.high,
                    step=_STEP,
                    value=_number(value),
                    label="Style discrepancy, fixed",
                    visible=_kind(value) == _FIXED,
                    elem_id=draw.id("beta_number"),
                )
            )
        self.knobs["beta"] = draw.knob("beta", hidden=True)
        self._known = draw.gr.HTML("", elem_id=draw.id("known"))
        with draw.gr.Row(elem_classes=_BUTTONS):
            self._measure = draw.button(
                "Measure now", "Draws both LoRAs' pictures, again if they have been drawn, and compares them"
            )
            self._cancel = draw.button("Cancel", "Ends the measuring")

    def _draw_presets(self, draw: _Drawing) -> None:
        with draw.gr.Row(elem_classes=_BUTTONS):
            self._preset = draw.own(
                draw.gr.Dropdown(
                    choices=_preset_names(),
                    value=None,
                    label="Preset",
                    info="a set of all knobs under a name; choose one, or type a new name to save",
                    allow_custom_value=True,
                    elem_id=draw.id("preset"),
                )
            )
            self._load = draw.button("Load", "Sets this panel by the preset")
            self._save = draw.button("Save", "Saves this panel under the name beside")
            self._delete = draw.button("Delete", "Forgets the preset of the name beside")

    # -- what happens

    def _connect(self, draw: _Drawing) -> None:
        """Connects what needs nothing of the host's page."""
        knobs = [self.knobs[key] for key in KNOBS]
        pairs = [self.knobs[key] for pair in _EXCHANGED for key in pair]
        turned = [self.knobs[key] for one, other in _EXCHANGED for key in (other, one)]
        self._exchange.click(fn=lambda *values: values, inputs=pairs, outputs=turned, show_progress=False)
        told = [self._preset, self._said]
        self._save.click(fn=_answering(_save, 1), inputs=[self._preset, *knobs], outputs=told, show_progress=False)
        self._delete.click(fn=_answering(_delete, 1), inputs=[self._preset], outputs=told, show_progress=False)
        self._load.click(
            fn=_answering(_load, len(KNOBS)), inputs=[self._preset], outputs=[*knobs, self._said], show_progress=False
        )
        kind, number, beta = self._kind, self._number, self.knobs["beta"]
        for chosen in (kind.input, number.release):
            chosen(fn=_beta, inputs=[kind, number], outputs=[beta, number], **_AT_ONCE)
        beta.change(fn=_told, _js=self._seen("beta"), inputs=[beta], outputs=[kind, number], **_AT_ONCE)
        self._cancel.click(fn=measuring.cancel, inputs=[], outputs=[], **_AT_ONCE)
        # The cards of the extra networks press these; the page's script knows which card it was.
        dummy = draw.gr.Textbox(visible=False)
        for key, other in (FILES, FILES[::-1]):
            button = draw.button(f"Use the card as {key}", "", key=f"pick_{key}", elem_classes=["est-lora-hidden"])
            button.click(
                fn=_answering(functools.partial(_pick, key), 2),
                _js="estLoraPicked",
                inputs=[dummy, self.knobs[other]],
                outputs=[self.knobs[key], self.knobs["enabled"], self._said],
                show_progress=False,
            )

    def _wire(self) -> None:
        """Connects the map, the tag and the host's page, once all of them are on it."""
        from gradio.context import Context

        names = [*_OF_PAGE, *(_OF_IMG2IMG if self._tab == "img2img" else ())] if self.knobs else []
        blocks = getattr(Context.root_block, "blocks", {})
        page = [self._page.get(name) for name in names]
        if self._is_wired or not names or any(part is None or blocks.get(part._id) is not part for part in page):
            return
        self._is_wired = True
        knobs = [self.knobs[key] for key in KNOBS]
        for event in _together([component.change for component in (*knobs, *page[1:])]):
            self._redraw(event, page)
        inserted = self._insert.click(
            fn=_answering(_insert, 1), inputs=[page[0], *knobs], outputs=[page[0], self._said], show_progress=False
        )
        self._redraw(inserted.then, page)
        measured = self._measure.click(
            fn=functools.partial(_measure, self._script),
            inputs=[self._drawn, page[0], *knobs],
            outputs=[self._said],
            show_progress=False,
        )
        self._redraw(measured.then, page)
        read = self._read.click(
            fn=_answering(_read, len(KNOBS) + 1),
            inputs=[page[0]],
            outputs=[page[0], *knobs, self._said],
            show_progress=False,
        )
        self._redraw(read.then, page)

    def _seen(self, purpose: str) -> str:
        """What holds an event back in the page until the panel is seen.

        Gradio reports changes while it loads a page, and every answer costs time.
        """
        return f"(...values) => window.estLoraSeen ? estLoraSeen('{self._tab}', '{purpose}', ...values) : values"

    def _redraw(self, event: Callable[..., Any], page: list[Any]) -> None:
        """Has an event redraw the cards and the map.

        Gradio 3 drops an event while the one before is being answered. So the first answer is only a pause; after it
        the map is drawn, and once more if anything has changed meanwhile: what is read last is what is there. Nothing
        is asked while the panel is folded.
        """
        drawing = {
            "fn": functools.partial(_draw, self._preview),
            "inputs": [self._drawn, *(self.knobs[key] for key in KNOBS), *page],
            "outputs": [self._cards, self._known, self._map],
            **_AT_ONCE,
        }
        event(fn=_pause, _js=self._seen("map"), inputs=[], outputs=[], **_AT_ONCE).then(**drawing).then(**drawing)


def _together(changes: list[Callable[..., Any]]) -> list[Callable[..., Any]]:
    """The changes as one event where gradio can have that: each event costs time whenever the page is loaded."""
    import gradio as gr

    if not hasattr(gr, "on"):
        return changes
    return [lambda _js, **how: gr.on(changes, js=_js, **how)]


class _Drawing:
    """Makes components, with identifiers of one script, and the user's own defaults for values."""

    def __init__(self, gr: Any, script: Any, defaults: Mapping[str, object]) -> None:
        self.gr = gr
        self._script = script
        self._defaults = defaults

    def id(self, key: str) -> str:
        return str(self._script.elem_id(key))

    def own(self, component: Any) -> Any:
        """A component whose value the host isn't to keep among its own defaults: the settings have it."""
        component.do_not_save_to_config = True
        return component

    def default(self, key: str) -> Any:
        """What a knob begins with."""
        return shown(BY_KEY[key], self._defaults[key])

    def knob(self, key: str, *, hidden: bool = False) -> Any:
        field = BY_KEY[key]
        kind, arguments = settings.component(field)
        made = getattr(self.gr, kind)(
            value=self.default(key),
            label=field.label,
            info=field.help,
            elem_id=self.id(key),
            # By the first the page's script knows which keys a tag may have.
            elem_classes=["est-lora-knob", *(["est-lora-hidden"] if hidden else [])],
            **arguments,
        )
        return self.own(made)

    def file(self, key: str, names: list[str]) -> Any:
        field = BY_KEY[key]
        return self.gr.Dropdown(
            choices=names,
            value=NOTHING,
            label=field.label,
            info=field.help,
            elem_id=self.id(key),
            allow_custom_value=True,  # a name whose file has gone is said in words, not by an error of the page
        )

    def button(self, words: str, about: str, *, key: str = "", **more: Any) -> Any:
        elem_id = self.id(key or words.lower().replace(" ", "_"))
        return self.own(self.gr.Button(words, elem_id=elem_id, size="sm", tooltip=about, **more))


def read(arguments: Sequence[object]) -> dict[str, object]:
    """The knobs that the panel or the API asks for; nothing where it is switched off.

    Args:
        arguments: the values of the panel's components, or one dict of knobs in the place of the first.
    """
    first = arguments[0] if arguments else None
    if isinstance(first, Mapping):
        given: dict[str, object] = {"enabled": True, **first}
    else:
        given = {key: value for key, value in zip(KNOBS, arguments) if not _is_nothing(value)}
    try:
        is_on = BY_KEY["enabled"].parse(given.get("enabled", False))
    except EstLoraError:
        is_on = True  # what is wrong with it is said where all knobs are checked
    return given if is_on else {}


def _is_nothing(value: object) -> bool:
    return value is None or (isinstance(value, str) and value in ("", NOTHING))


# -- what buttons do: each returns what it changes, and a sentence


def _answering(action: Callable[..., tuple[list[Any], str]], changes: int) -> Callable[..., list[Any]]:
    """`action` for a page: what goes wrong becomes a sentence, and nothing is changed."""

    def act(*values: Any) -> list[Any]:
        import gradio as gr

        try:
            changed, sentence = action(*values)
        except Exception as error:  # noqa: BLE001 - the page would say only that there was one
            return [*[gr.update()] * changes, say(explained(error), is_error=True)]
        return [*changed, say(sentence)]

    return act


def _pick(key: str, name: str, other: str | None) -> tuple[list[Any], str]:
    import gradio as gr

    found = LoraList().find(name).name
    is_pair = not _is_nothing(other)
    return [found, True if is_pair else gr.update()], f"{found} is the {key}."


def _insert(prompt: str, *values: object) -> tuple[list[Any], str]:
    knobs = _with_names(_shown(values), LoraList().name_in_tag)
    written = tag.write({**knobs, "enabled": True}, settings.defaults())
    return [tag.put(prompt, written)], "The tag is in the prompt; from now on it goes before this panel."


def _read(prompt: str) -> tuple[list[Any], str]:
    tags = tag.find(prompt)
    if not tags:
        raise EstLoraError(f"There is no <{tag.NAME}:...> tag in the prompt.")
    loras = LoraList()
    knobs = _with_names(_typed(request.combined(request.of_tags(tags))), lambda name: loras.find(name).name)
    values = [shown(BY_KEY[key], knobs[key]) for key in KNOBS]
    return [tag.without(prompt), *values], "The tag was taken out of the prompt; this panel has what it said."


def _typed(knobs: Mapping[str, object]) -> dict[str, object]:
    """Every knob, checked and as its own type."""
    config = FusionConfig.of(knobs)
    return {key: getattr(config, key) for key in KNOBS}


def _shown(values: Sequence[object]) -> dict[str, object]:
    """Every knob as the panel shows it, whether it is switched on or not."""
    return _typed(request.combined(read([True, *values[1:]])))


def _with_names(knobs: Mapping[str, object], name_of: Callable[[str], str]) -> dict[str, object]:
    """The knobs, their files under the names that `name_of` gives."""
    return {key: name_of(value) if key in FILES and isinstance(value, str) else value for key, value in knobs.items()}


def _save(name: str | None, *values: object) -> tuple[list[Any], str]:
    import gradio as gr

    presets = _presets()
    presets.save(name or "", _shown(values))
    sentence = " ".join([f"Saved as {(name or '').strip()}.", *presets.remarks])
    return [gr.update(choices=presets.names(), value=(name or "").strip())], sentence


def _delete(name: str | None) -> tuple[list[Any], str]:
    import gradio as gr

    presets = _presets()
    presets.delete(name or "")
    sentence = " ".join([f"{(name or '').strip()} is forgotten.", *presets.remarks])
    return [gr.update(choices=presets.names(), value=None)], sentence


def _load(name: str | None) -> tuple[list[Any], str]:
    import gradio as gr

    presets = _presets()
    knobs = presets.load(name or "")
    values = [shown(BY_KEY[key], knobs[key]) if key in knobs else gr.update() for key in KNOBS]
    return values, " ".join([f"{(name or '').strip()} is in the panel.", *presets.remarks])


def _presets() -> Presets:
    from modules.paths import data_path

    return Presets(Path(data_path) / "est-lora" / "presets.json")


def _preset_names() -> list[str]:
    try:
        return _presets().names()
    except EstLoraError:  # said when one is used
        return []


# -- the style discrepancy


def _kind(beta: str) -> str:
    return _MEASURED if beta == AUTO else _FIXED


def _number(beta: str) -> float:
    """The number that a text says; what it would be unmeasured, where it says none."""
    try:
        number = BY_KEY["beta"].parse(beta)
    except EstLoraError:  # said beside the map
        return BETA_UNMEASURED
    return number if isinstance(number, float) else BETA_UNMEASURED


def _beta(kind: str, number: float | None) -> list[Any]:
    """What the user has set, as the knob's text."""
    import gradio as gr

    is_fixed = kind == _FIXED
    return [BY_KEY["beta"].text(float(number or 0)) if is_fixed else AUTO, gr.update(visible=is_fixed)]


def _told(beta: str) -> list[Any]:
    """What something else has set, as the user sees it."""
    import gradio as gr

    is_fixed = _kind(beta) == _FIXED
    return [_kind(beta), gr.update(visible=is_fixed, value=_number(beta)) if is_fixed else gr.update(visible=False)]


def _measure(script: Any, drawn: Drawn, prompt: str, *values: Any) -> Iterator[str]:
    """Measures the pair of the panel, or of the tag that goes before it, and tells how it goes."""
    yield say("Two small pictures are drawn, when what is being drawn has ended ...")
    try:
        knobs = request.combined(read([True, *values[1:]]), request.of_tags(tag.find(prompt or "")))
        loras = LoraList()
        entries = [loras.find(name) for name in FusionConfig.of(knobs).pair()]
        found = measuring.measure_now(script, *entries, prompt or "")
    except Exception as error:  # noqa: BLE001 - as above
        yield say(explained(error), is_error=True)
        return
    drawn.values = ()  # what is drawn of the same knobs isn't the same any more
    yield say("It wasn't measured." if found is None else f"The style discrepancy is {found:.3g}.")


def _pause() -> None:
    time.sleep(_PAUSE_S)


def _draw(preview: Preview, drawn: Drawn, *values: Any) -> list[Any]:
    """The cards and the map of what will be done."""
    import gradio as gr

    if values == drawn.values:
        return [gr.update()] * 3
    drawn.values = values
    knobs, (prompt, sampler, scheduler, steps, *strength) = values[: len(KNOBS)], values[len(KNOBS) :]
    try:
        tagged = request.of_tags(tag.find(prompt or ""))
        # While it is switched off, it shows what it would do.
        asked = read(knobs) if tagged else read([True, *knobs[1:]])
        asked = request.combined(asked, tagged)
    except EstLoraError as error:
        return ["", "", say(str(error), is_error=True)]
    said = say("The tag in the prompt goes before this panel.") if tagged else ""
    sampling = Sampling(sampler, scheduler, int(steps or 0), *strength)
    known, planned = preview.draw(asked, sampling, prompt or "")
    return [cards([asked.get(key) for key in FILES]), known, said + planned]


def _lora_list() -> tuple[list[str], str]:
    """The names of all files, and why there are none."""
    try:
        return LoraList().names(), ""
    except EstLoraError as error:
        return [], str(error)


def _refresh() -> None:
    try:
        LoraList().refresh()
    except EstLoraError:  # the panel says so
        return


def _choices() -> dict[str, list[str]]:
    return {"choices": [NOTHING, *_lora_list()[0]]}
