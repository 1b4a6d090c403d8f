"""The style discrepancy of a pair: measured beside the user's job, remembered, and what becomes of it."""

from __future__ import annotations

import json
import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from est_lora.discrepancy import Memory
from est_lora.errors import EstLoraError
from est_lora.hosts.webui import measuring
from est_lora.hosts.webui.loras import LoraList
from tests.hosts.webui.host import Processing
from tests.hosts.webui.looks import state_hash
from tests.hosts.webui.loras import INK, KNIGHT, PAIR

STEPS = 3
OF = measuring.Measuring.of


class Looker:
    """An extractor that sees the mean colour."""

    name, identity = "dino", "dino@test"

    def features(self, pictures):
        return torch.stack([torch.tensor(np.asarray(picture)).float().mean((0, 1)) - 100 for picture in pictures])


@pytest.fixture
def looks(monkeypatch):
    """How often the extractor was opened; an error in the list is raised at the next time."""
    opened = []

    @contextmanager
    def open_extractor(name, **how):
        opened.append((name, how["folder"]))
        torch.rand(1), random.random(), np.random.rand()
        if isinstance(opened[0], Exception):
            raise opened[0]
        yield Looker()

    monkeypatch.setattr(measuring, "open_extractor", open_extractor)
    monkeypatch.setattr(measuring, "identity_of", lambda name, folder: f"{name} {folder}")
    return opened


@pytest.fixture
def host(web, looks, tmp_path, monkeypatch):
    """Each host in turn, which measures."""
    monkeypatch.setattr(measuring.Measuring, "of", OF)
    web.modules["modules.paths"].data_path = str(tmp_path)
    web.modules["modules.shared"].opts.data["est_lora_probe_steps"] = STEPS
    web.load_entry()
    return web


def picture(web, prompt=f"a knight {PAIR}", **knobs):
    """A fused picture: its latent, the parameters, the comments, and how many calls of the UNet it took."""
    before = len(web.calls)
    p = Processing(web, prompt, **knobs)
    made = web.make(p)
    return made[0].latent, made[-1].infotext, [*p.comments], len(web.calls) - before


def beta(infotext):
    return infotext["EST-LoRA beta"]


def test_the_first_picture_measures_and_the_second_remembers(host, looks):
    first, told, comments, calls = picture(host)
    assert calls == 5 + 2 * STEPS
    assert 0 < beta(told) < 2
    assert comments == []
    again, told_again, _, calls = picture(host)
    assert calls == 5
    assert torch.equal(first, again)
    assert told_again == told
    assert len(looks) == 1


def test_the_number_makes_the_same_picture(host):
    first, told, *_ = picture(host)
    given, *_ = picture(host, f"a knight {PAIR[:-1]}:beta={beta(told)}>")
    assert torch.equal(first, given)
    other, *_ = picture(host, f"a knight {PAIR[:-1]}:beta=2>")
    assert not torch.equal(first, other)


def test_each_lora_is_alone_in_its_picture(host):
    picture(host)
    calls = [*host.calls]
    of_subject, of_style = calls[:STEPS], calls[STEPS : 2 * STEPS]
    plain = Processing(host, "a knight", seed=0, steps=STEPS)
    begun = len(host.calls)
    host.make(plain)
    without = host.calls[begun:]
    assert not torch.equal(of_subject[0].out, of_style[0].out)
    for made in (of_subject, of_style):
        assert made[0].timestep == without[0].timestep
        assert not torch.equal(made[0].out, without[0].out)


@pytest.mark.parametrize("prompt", [f"a knight {PAIR[:-1]}:beta=0.4>", f"a knight {PAIR[:-1]}:method=sum>", "a knight"])
def test_nothing_is_measured_that_does_not_count(host, looks, prompt):
    assert picture(host, prompt)[3] == 5
    assert looks == []


@pytest.mark.parametrize("method", ["k-lora", "sum", "subject", "style"])
def test_nothing_is_looked_up_that_does_not_count(host, monkeypatch, method):
    picture(host)
    with monkeypatch.context() as patched:
        patched.setattr(Memory, "find", lambda *args: pytest.fail("it was looked up"))
        _, told, comments, _ = picture(host, f"a knight {PAIR[:-1]}:method={method}>")
    assert comments == []
    assert "EST-LoRA beta" not in told


@pytest.mark.parametrize("change", [{"prompt": f"a dog {PAIR}"}, {"seed": 8}, {"extractor": "clip"}, {"pair": "other"}])
def test_what_a_discrepancy_depends_on(host, change):
    first = beta(picture(host)[1])
    data = host.modules["modules.shared"].opts.data
    if "seed" in change:
        data["est_lora_probe_seed"] = change["seed"]
    if "extractor" in change:
        data["est_lora_extractor"] = change["extractor"]
    prompt = change.get("prompt", "a knight <est:stone:wood>" if "pair" in change else f"a knight {PAIR}")
    _, _, _, calls = picture(host, prompt)
    assert calls == 5 + 2 * STEPS
    assert beta(picture(host)[1]) == first or "seed" in change


@pytest.mark.parametrize(
    "prompt", [f"a knight {PAIR} <lora:stone:1>", f"a knight {PAIR[:-1]}:lean=0.5:subject_weight=0.2>"]
)
def test_what_it_does_not_depend_on(host, prompt):
    first = beta(picture(host)[1])
    _, told, _, calls = picture(host, prompt)
    assert (beta(told), calls) == (first, 5)


def test_a_cards_words_are_drawn(host, files):
    cards = [files.folder / f"{name}.json" for name in (KNIGHT, INK)]
    try:
        for card, words in zip(cards, ("kn1ght", "1nk")):
            card.write_text(json.dumps({"activation text": words}), encoding="utf-8")
        first = beta(picture(host)[1])
        _, told, _, calls = picture(host, f"a dog {PAIR}")
        assert (beta(told), calls) == (first, 5)
        host.modules["modules.shared"].opts.data["est_lora_probe_prompt"] = "of each picture"
        assert picture(host, f"a dog {PAIR}")[3] == 5 + 2 * STEPS
    finally:
        for card in cards:
            card.unlink(missing_ok=True)


def test_without_weights_a_sentence_and_a_half(host, looks):
    looks.append(EstLoraError("The DINO weights can't be fetched."))
    for _ in range(2):
        _, told, comments, calls = picture(host)
        assert (beta(told), calls) == (0.5, 5)
        assert comments == ["The DINO weights can't be fetched. For beta 0.5 is taken."]
    assert len(looks) == 2  # the error itself, and one try


@pytest.mark.parametrize("how", ["interrupted", "skipped"])
@pytest.mark.parametrize("call", [1, STEPS + 1])
def test_who_does_not_wait_loses_nothing_and_teaches_nothing(host, tmp_path, how, call):
    state = host.modules["modules.shared"].state
    made = []

    def stop(module, args):
        made.append(module)
        if len(made) == call:
            setattr(state, how, True)

    weights = state_hash(host)
    hook = host.unet.register_forward_pre_hook(stop)
    _, told, comments, _ = picture(host)
    hook.remove()
    assert getattr(state, how)  # the user means the picture too
    assert (beta(told), comments) == (0.5, [])
    assert not (tmp_path / "est-lora" / "discrepancy.json").exists()
    assert state_hash(host) == weights
    setattr(state, how, False)
    assert beta(picture(host)[1]) != 0.5


def test_a_failure_is_a_sentence(host, tmp_path):
    made = []

    def fail(module, args):
        made.append(module)
        if len(made) == 2:
            raise RuntimeError("no memory")

    hook = host.unet.register_forward_pre_hook(fail)
    _, told, comments, _ = picture(host)
    hook.remove()
    assert beta(told) == 0.5
    (comment,) = comments
    assert comment.startswith("The style discrepancy can't be measured (RuntimeError); the log has more. For beta")
    assert not (tmp_path / "est-lora" / "discrepancy.json").exists()
    assert beta(picture(host)[1]) != 0.5


def test_a_lora_that_cannot_be_applied_in_a_probe_is_said(host, monkeypatch):
    monkeypatch.setattr(measuring.probes.infotext, "refused", lambda p: "A file broke.")
    _, _, comments, _ = picture(host)
    assert comments == ["A file broke. For beta 0.5 is taken."]


def test_the_job_goes_on_as_if_nothing_had_been(host, tmp_path):
    last = tmp_path / "params.txt"
    last.write_bytes(b"the last picture's")
    state = host.modules["modules.shared"].state
    state.job, state.job_count, state.textinfo, state.current_image = "txt2img", 4, "words", "preview"
    seen = []

    class Other:
        def process_batch(self, p, **kwargs):
            last.write_bytes(b"this one's")
            seen.append((p, state.job, state.job_count, state.textinfo, state.current_image))

    host.others.append(Other())
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    host.script.measuring.of(*_asked(host))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == expected
    host.modules["modules.shared"].opts.data["est_lora_probe_seed"] = 1
    picture(host, tiling=True)
    ((_, *told),) = seen  # the probes have no scripts but ours
    assert told == ["txt2img", 4, "words", "preview"]
    assert host.tilings[-1] is True
    assert "assign_current_image" not in vars(state)


def _asked(web):
    p = Processing(web, "a knight")
    p.prompts = [p.prompt]
    return p, web.script, *(LoraList().find(name) for name in (KNIGHT, INK))


def test_a_store_that_cannot_be_written_is_no_error(host, tmp_path):
    (tmp_path / "est-lora").write_text("a file in the way")
    _, told, comments, calls = picture(host)
    assert calls == 5 + 2 * STEPS
    assert comments == []
    _, again, _, calls = picture(host)
    assert (beta(again), calls) == (beta(told), 5)


def test_a_second_pass_has_the_firsts(host):
    _, told, comments, calls = picture(host, enable_hr=True)
    assert comments == []
    assert calls == 2 * STEPS + 5 + 5
    assert beta(told) != 0.5


def test_a_bad_setting_is_a_sentence(host):
    host.modules["modules.shared"].opts.data["est_lora_probe_side"] = 3
    _, told, comments, calls = picture(host)
    assert (beta(told), calls) == (0.5, 5)
    assert "side can't be '3'" in comments[0]


class TestNow:
    """Measuring from the panel."""

    @pytest.fixture
    def entries(self, host):
        loras = LoraList()
        return loras.find(KNIGHT), loras.find(INK)

    def test_it_is_what_a_picture_measures(self, host, entries):
        found = measuring.measure_now(host.script, *entries, "a knight")
        _, told, _, calls = picture(host)
        assert (beta(told), calls) == (found, 5)
        assert host.modules["modules.shared"].state.job == ""

    def test_it_measures_again(self, host, entries):
        picture(host)
        begun = len(host.calls)
        measuring.measure_now(host.script, *entries, "a knight")
        assert len(host.calls) == begun + 2 * STEPS

    def test_what_is_known_is_told_with_its_pictures(self, host, entries, tmp_path):
        assert measuring.known(*entries, "a knight") is None
        value = measuring.measure_now(host.script, *entries, "a knight")
        found = measuring.known(*entries, "a knight <lora:stone:1>")
        assert (
            found.value
            == value
            == Memory(tmp_path / "est-lora").find(measuring.key_of(host.sd_model, *entries, "a knight"))
        )
        assert found.pictures.is_file()
        assert measuring.known(*entries, "a dog") is None

    def test_cancel_ends_only_the_measuring(self, host):
        state = host.modules["modules.shared"].state
        state.job = "txt2img"
        measuring.cancel()
        assert not state.interrupted
        state.begin(measuring._JOB)
        measuring.cancel()
        assert state.interrupted
