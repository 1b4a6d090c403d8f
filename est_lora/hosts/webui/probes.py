"""The two small pictures that a style discrepancy is measured on: jobs of the host's own, beside the user's."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from est_lora.config import FIELDS, FILES
from est_lora.discrepancy import ProbeSettings
from est_lora.errors import EstLoraError
from est_lora.hosts.webui import infotext

# What a job leaves in the host's state, which the progress bar and the preview show. Not what stops jobs: whoever
# interrupts a probe means the picture too.
_STATE = (
    *("job", "job_no", "job_count", "processing_has_refined_job_count", "job_timestamp", "time_start"),
    *("sampling_step", "sampling_steps", "textinfo"),
    *("current_latent", "current_image", "current_image_sampling_step", "id_live_preview"),
)
_NEVER = 1 << 30  # steps


class Stopped(Exception):
    """The user has interrupted or skipped a probe."""


def draw(p: Any, script: Any, pair: Mapping[str, str], settings: ProbeSettings, prompt: str) -> tuple[Any, Any]:
    """One picture with each LoRA alone, all else the same.

    Args:
        p: the user's job, which is about to read the prompts of a batch; None where there is none.
        script: our script, as the host runs it.
        pair: the names of subject and style.
        settings: seed, side, steps and so on.
        prompt: what to draw.

    Raises:
        Stopped: it was interrupted or skipped.
        EstLoraError: a LoRA can't be applied.
    """
    from modules import shared

    pictures = []
    with _beside(p):
        for number, role in enumerate(FILES, 1):
            shared.state.textinfo = f"EST-LoRA measures the style discrepancy: picture {number} of {len(FILES)}"
            # Every knob, so that no setting of the user's moves it.
            knobs = {field.key: field.default for field in FIELDS} | {**pair, "method": role, "beta": 0.0}
            made = _picture(script, knobs, settings, prompt)
            if shared.state.interrupted or shared.state.skipped or getattr(shared.state, "stopping_generation", False):
                raise Stopped
            pictures.append(made)
    return pictures[0], pictures[1]


def _picture(script: Any, knobs: Mapping[str, object], settings: ProbeSettings, prompt: str) -> Any:
    from modules import processing

    inner = processing.StableDiffusionProcessingTxt2Img(
        prompt=prompt,
        negative_prompt="",
        seed=settings.seed,
        subseed=settings.seed,
        steps=settings.steps,
        width=settings.side,
        height=settings.side,
        sampler_name=settings.sampler,
        scheduler="Automatic",
        cfg_scale=settings.guidance,
        tiling=False,
        restore_faces=False,
        do_not_save_samples=True,
        do_not_save_grid=True,
        do_not_reload_embeddings=True,
    )
    # Encoded prompts are remembered for all jobs of the host, but not these.
    inner.cached_c, inner.cached_uc = [None] * len(inner.cached_c), [None] * len(inner.cached_uc)
    inner.scripts = _only(script)
    inner.script_args = [None] * script.args_from + [dict(knobs)] + [None] * (script.args_to - script.args_from - 1)
    try:
        made = processing.process_images(inner)
        if why := infotext.refused(inner):
            raise EstLoraError(why)
        return made.images[0] if made.images else None
    finally:
        inner.close()


def _only(script: Any) -> Any:
    """The host's scripts without any but ours."""
    from modules import scripts

    runner = copy.copy(scripts.scripts_img2img if script.is_img2img else scripts.scripts_txt2img)
    runner.alwayson_scripts = [script]
    runner.callback_map = {}  # who is called when, as it was found for all scripts
    return runner


@contextmanager
def _beside(p: Any) -> Iterator[None]:
    """Whatever other jobs do, the user's goes on afterwards as if they hadn't been; but for random numbers."""
    from modules import paths, shared

    with ExitStack() as undone:
        state = shared.state
        kept = {name: getattr(state, name) for name in _STATE if hasattr(state, name)}
        undone.callback(vars(state).update, kept)
        # No preview of it, and a progress bar that waits; but its words are shown.
        state.assign_current_image = lambda image: None
        undone.callback(vars(state).pop, "assign_current_image", None)
        state.current_image_sampling_step, state.job_count, state.job_no = _NEVER, 0, 0
        undone.callback(shared.total_tqdm.clear)
        last = Path(paths.data_path, "params.txt")  # what the host's button for the last parameters reads
        if last.is_file():
            undone.callback(last.write_bytes, last.read_bytes())
        if p is not None:
            undone.callback(_reset_model, p, getattr(p.sd_model, "forge_objects", None))
        yield


def _reset_model(p: Any, forge_objects: Any) -> None:
    """What the host sets on the model at a job's beginning, as `p` has it."""
    if forge_objects is not None:
        from modules import processing

        p.sd_model.forge_objects = forge_objects
        processing.apply_circular_forge(p.sd_model, p.tiling)
    else:
        from modules import sd_hijack, sd_models

        sd_hijack.model_hijack.apply_circular(p.tiling)
        sd_models.apply_token_merging(p.sd_model, p.get_token_merging_ratio())
