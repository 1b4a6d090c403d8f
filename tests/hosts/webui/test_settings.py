"""The page of settings."""

from __future__ import annotations

import logging

import pytest

from est_lora.config import FIELDS
from est_lora.discrepancy import NAMES, ProbeSettings
from est_lora.errors import EstLoraError
from est_lora.hosts.webui import settings

OURS = {f"est_lora_{field.key}": field for field in FIELDS if field.key not in ("enabled", "subject", "style")}


@pytest.fixture(autouse=True)
def logger():
    """Ours, as it was."""
    logger = logging.getLogger("est_lora")
    level, handlers = logger.level, [*logger.handlers]
    yield logger
    logger.setLevel(level)
    logger.handlers[:] = handlers


@pytest.fixture
def opts(web):
    return web.modules["modules.shared"].opts


@pytest.fixture
def options(web, opts):
    web.callbacks.call("on_ui_settings")
    return opts.options


def test_every_knob_but_the_pair_is_on_the_page(options):
    house = ("est_lora_extractor", "est_lora_probe", "est_lora_draw_map", "est_lora_save_map")
    house += ("est_lora_originals", "est_lora_log")
    assert list(options)[: len(OURS)] == list(OURS)
    assert all(key.startswith(house) for key in list(options)[len(OURS) :])
    assert {option.section for option in options.values()} == {("est_lora", "EST-LoRA")}
    for key, field in OURS.items():
        assert options[key].label == field.label
        assert options[key].about == field.help
        assert options[key].reloads


def test_labels_are_unique(options):
    assert len({option.label for option in options.values()}) == len(options)


def test_the_page_begins_with_what_the_program_has_built_in(options, opts):
    before = settings.defaults()
    assert (settings.draws_map(), settings.saves_map()) == (True, False)
    opts.data |= {key: option.default for key, option in options.items()}
    assert settings.defaults() == before == {field.key: field.default for field in OURS.values()}
    assert settings.draws_map()
    assert not settings.saves_map()


def test_what_can_be_chosen_can_be_used(options, web):
    for key, field in OURS.items():
        option = options[key]
        made = option.component(**option.arguments)
        chosen = made.choices if field.choices else [option.default]
        if made.kind == "Slider":
            assert made.minimum == pytest.approx(field.low + (made.step if field.above_low else 0))
            assert made.maximum == field.high
            chosen = [made.minimum, made.maximum, option.default]
        for value in chosen:
            field.parse(value)
    assert options["est_lora_beta"].component().kind == "Textbox"


def test_what_is_set_is_the_default(opts):
    opts.data |= {"est_lora_lean": -0.5, "est_lora_beta": "0.3", "est_lora_hires": "off", "est_lora_draw_map": False}
    found = settings.defaults()
    assert (found["lean"], found["beta"], found["hires"], found["alpha"]) == (-0.5, 0.3, "off", 1.5)
    assert not settings.draws_map()
    opts.data["est_lora_save_map"] = True
    assert settings.saves_map()


@pytest.mark.parametrize("value", ["much", 7, None, [], "nan"])
def test_what_cannot_be_used_is_told_and_counts_as_not_set(opts, caplog, value):
    opts.data |= {"est_lora_lean": value, "est_lora_alpha": 3}
    with caplog.at_level(logging.WARNING, "est_lora"):
        found = settings.defaults()
    assert (found["lean"], found["alpha"]) == (0.0, 3.0)
    assert "Settings -> EST-LoRA: lean can't be" in caplog.text


@pytest.mark.parametrize(
    ("chosen", "level"),
    [
        ("warnings", logging.WARNING),
        ("every fusion", logging.INFO),
        ("every layer", logging.DEBUG),
        ("x", logging.WARNING),
    ],
)
def test_the_log_lets_through_what_was_chosen(opts, options, logger, chosen, level):
    opts.data["est_lora_log"] = chosen
    options["est_lora_log"].onchange()
    assert logger.level == level


def test_every_level_can_be_chosen(options):
    assert options["est_lora_log"].arguments == {"choices": ["warnings", "every fusion", "every layer"]}
    assert options["est_lora_log"].default == "warnings"


def test_the_level_is_set_when_the_host_starts(web, opts, logger):
    opts.data["est_lora_log"] = "every layer"
    web.load_entry()
    assert logger.level == logging.DEBUG


def test_a_host_without_a_log_of_its_own_gets_one_handler(opts, logger, monkeypatch):
    logger.handlers.clear()
    monkeypatch.setattr(logger, "propagate", False)
    for _ in range(2):
        settings._set_log_level()
    assert len(logger.handlers) == 1


def test_a_host_with_a_log_of_its_own_gets_none(opts, logger, monkeypatch):
    logger.handlers.clear()
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])
    settings._set_log_level()
    assert not logger.handlers


class TestMeasuring:
    """How a style discrepancy is measured."""

    @pytest.mark.parametrize(("is_xl", "native"), [(False, 512), (True, 1024)])
    def test_the_page_begins_with_what_is_usual(self, opts, options, is_xl, native):
        opts.data |= {key: option.default for key, option in options.items()}
        assert settings.probe(is_xl=is_xl) == ProbeSettings.usual(native)
        assert settings.extractor() == (NAMES[0], None)
        assert not settings.draws_own_prompt()

    @pytest.mark.parametrize(("key", "value"), [("seed", 7.0), ("side", 320), ("steps", 9), ("guidance", 1.5)])
    def test_what_is_set_counts(self, opts, options, key, value):
        opts.data[f"est_lora_probe_{key}"] = value
        assert getattr(settings.probe(is_xl=True), key) == value
        assert settings.probe(is_xl=True) != ProbeSettings.usual(1024)

    @pytest.mark.parametrize(
        ("key", "value"), [("seed", "x"), ("side", 3), ("side", 12), ("steps", None), ("guidance", "much")]
    )
    def test_what_cannot_be_used_is_said(self, opts, options, key, value):
        opts.data[f"est_lora_probe_{key}"] = value
        with pytest.raises(EstLoraError, match=key):
            settings.probe(is_xl=False)

    def test_each_prompt_is_asked_for_by_a_word_that_can_be_chosen(self, opts, options):
        _, second = options["est_lora_probe_prompt"].arguments["choices"]
        opts.data["est_lora_probe_prompt"] = second
        assert settings.draws_own_prompt()

    def test_a_folder_may_be_at_home(self, opts, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path))
        opts.data |= {"est_lora_extractor": "clip", "est_lora_extractor_folder": " ~/clip "}
        assert settings.extractor() == ("clip", tmp_path / "clip")


def test_where_original_weights_wait(options, opts):
    chosen = options["est_lora_originals"].arguments["choices"]
    assert settings.originals() == "device"
    found = []
    for choice in (*chosen, "somewhere", None):
        opts.data["est_lora_originals"] = choice
        found.append(settings.originals())
    assert found == ["device", "cpu", "never", "device", "device"]
