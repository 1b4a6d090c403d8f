"""Who goes before whom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from est_lora.config import FIELDS, FusionConfig
from est_lora.errors import EstLoraError
from est_lora.hosts.webui import request, settings
from tests.hosts.webui.host import Processing
from tests.hosts.webui.loras import PAIR

KEYS = ("lean", "alpha", "beta")
SOME = st.dictionaries(st.sampled_from(KEYS), st.integers(1, 2))


@pytest.fixture
def use(web):
    def use(**values):
        web.modules["modules.shared"].opts.data |= {f"est_lora_{key}": value for key, value in values.items()}

    return use


def test_nobody_asks(use):
    use(lean=0.5)
    assert request.combined() == request.combined({}, {}) == {}


def test_settings_count_where_nobody_says_otherwise(use):
    use(lean=0.5, alpha=3.0)
    knobs = request.combined({"subject": "a", "lean": 0.25})
    assert FusionConfig.of(knobs) == FusionConfig(subject="a", lean=0.25, alpha=3.0)
    assert knobs.keys() == {field.key for field in FIELDS} - {"enabled", "style"}


@given(SOME, SOME, SOME)
def test_the_last_that_asks_goes_first(one, two, three):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(settings, "defaults", lambda: {"lean": 0, "alpha": 0, "beta": 0, "hires": "same"})
        knobs = request.combined(one, two, three)
    asked = [each for each in (three, two, one) if each]
    if not asked:
        assert knobs == {}
        return
    for key in KEYS:
        assert knobs[key] == next((each[key] for each in asked if key in each), 0)
    assert knobs["hires"] == "same"


def used(web, prompt, args=None):
    p = Processing(web, prompt, args=args)
    web.make(p)
    return p.est_lora.done[0].config


def test_a_picture_is_made_by_tag_over_panel_over_settings(web, use):
    use(lean=0.5, alpha=3.0, hires="off", beta="0.7")
    panel = [{"subject": "stone", "style": "wood", "lean": 0.25, "alpha": 2.0}]
    assert used(web, f"a knight {PAIR[:-1]}:lean=-1>", panel) == FusionConfig(
        subject="knight", style="ink", lean=-1, alpha=2.0, hires="off", beta=0.7
    )
    assert used(web, "a knight", panel) == FusionConfig(
        subject="stone", style="wood", lean=0.25, alpha=2.0, hires="off", beta=0.7
    )
    assert used(web, f"a knight {PAIR}") == FusionConfig(
        subject="knight", style="ink", lean=0.5, alpha=3.0, hires="off", beta=0.7
    )


def test_settings_alone_fuse_nothing(web, use):
    use(lean=0.5)
    p = Processing(web, "a knight")
    web.make(p)
    assert p.est_lora.done is None
    assert not p.comments


def test_one_tag_is_meant():
    assert request.of_tags([]) == {}
    assert request.of_tags([{"lean": "1"}]) == {"lean": "1"}
    with pytest.raises(EstLoraError, match="The prompt has 2 <est:...> tags, and one fusion needs one: keep one."):
        request.of_tags([{}, {}])


def test_a_tag_that_was_not_read_is_pointed_out():
    request.check_all_read(["a knight <lora:a", "est:a:b", "< est:a:b>"])
    with pytest.raises(EstLoraError, match="A <est:...> tag wasn't read: close it with >"):
        request.check_all_read(["a knight", "a <est:a"])
