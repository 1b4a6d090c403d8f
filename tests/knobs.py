"""Any knobs, for properties."""

from __future__ import annotations

from hypothesis import strategies as st

from est_lora.config import AUTO, FIELDS, Field, FusionConfig

FILES = ("subject", "style")
# Every knob at another value than the default, as the panel shows it.
OTHERWISE = {
    **dict.fromkeys(("subject_weight", "style_weight", "lean"), 0.5),
    **dict.fromkeys(("subject_te", "style_te"), 0.0),
    **{field.key: field.choices[-1] for field in FIELDS if field.choices},
    "beta": "0.4",
    "alpha": 3.0,
}


def values(field: Field) -> st.SearchStrategy[object]:
    """What a knob that isn't a file can be."""
    if field.choices:
        return st.sampled_from(field.choices)
    if field.type is bool:
        return st.booleans()
    numbers = st.floats(field.low, field.high, exclude_min=field.above_low)
    return st.just(AUTO) | numbers if field.auto else numbers


def settings() -> st.SearchStrategy[dict[str, object]]:
    """What a user may have set."""
    fields = [field for field in FIELDS if field.key not in (*FILES, "enabled")]
    return st.fixed_dictionaries({field.key: values(field) for field in fields})


def configs(names: st.SearchStrategy[str]) -> st.SearchStrategy[FusionConfig]:
    """Requests for two files with these names; some knobs at their defaults."""
    others = {field.key: st.just(field.default) | values(field) for field in FIELDS if field.key not in FILES}
    return st.builds(FusionConfig, **dict.fromkeys(FILES, names), **others)
