"""The prompt tag: `<est:subject:style>`, `<est:subject:style:1:0.8>`, and any knob by its key, `<est:a:b:beta=0.4>`.

WebUIs cut a tag at its colons and hand over the pieces; nothing is quoted, so no piece holds `:` or `>`.
"""

from __future__ import annotations

from collections.abc import Sequence

from est_lora.errors import EstLoraError, quote

NAME = "est"
_POSITIONS = ("subject", "style", "subject_weight", "style_weight")


def read(pieces: Sequence[str]) -> dict[str, str]:
    """The knobs that a tag sets, by their keys, as text; whether they exist and fit is for `FusionConfig` to say.

    Args:
        pieces: what stands between the colons after `est`. The first without `=` are subject, style and both weights.

    Raises:
        EstLoraError: there are too many pieces, or one knob is given twice.
    """
    knobs: dict[str, str] = {}
    positions = iter(_POSITIONS)
    for piece in pieces:
        key, named, value = (part.strip() for part in piece.partition("="))
        if not named:
            key, value = next(positions, ""), key
        if not key:
            raise EstLoraError(
                f"The tag <{NAME}:...> has more to it than can be understood at {quote(piece)}: after subject, style and"
                " two weights everything is key=value."
            )
        if key in knobs:
            raise EstLoraError(f"The tag <{NAME}:...> gives {quote(key)} twice: give it once.")
        if value:
            knobs[key] = value
    return knobs
