"""AUTOMATIC1111's WebUI, Forge and its kin as hosts."""

from __future__ import annotations

from typing import Any

from est_lora.hosts.webui import api, panel, paste, settings, tags
from est_lora.hosts.webui.axes import add as add_axes
from est_lora.hosts.webui.job import Job
from est_lora.hosts.webui.measuring import Measuring
from est_lora.hosts.webui.panel import TITLE, Panel
from est_lora.hosts.webui.plans import Plans
from est_lora.hosts.webui.saved import save_map

__all__ = [
    "TITLE",
    "Measuring",
    "Panel",
    "Plans",
    "add_axes",
    "before_batch",
    "before_sampling",
    "begin",
    "prompts_read",
    "register",
]

_ATTRIBUTE = "est_lora"


def register() -> None:
    """Enters us into the host's callbacks; to be called each time that it has cleared them."""
    from modules import script_callbacks

    settings.register()
    script_callbacks.on_image_saved(lambda saved: save_map(saved.filename, getattr(saved.p, _ATTRIBUTE, None)))
    script_callbacks.on_infotext_pasted(lambda _, parameters: paste.rename_tags(parameters))
    script_callbacks.on_before_ui(lambda: tags.register(begin))  # earlier, and the host would forget it
    script_callbacks.on_app_started(lambda _, app: api.add_routes(app))
    script_callbacks.on_script_unloaded(api.guard_requests())


def begin(p: Any, arguments: tuple[object, ...], script: Any) -> None:
    """A generation starts, with these values of the panel: `script` has `Plans`."""
    if isinstance(job := getattr(p, _ATTRIBUTE, None), Job):
        job.release()
    setattr(p, _ATTRIBUTE, Job(p, panel.read(arguments), script.plans))


def before_batch(p: Any, script: Any) -> None:
    """A batch is about to begin: `script`, which has a `Measuring`, may draw first what is to be measured."""
    _job(p, script).measure(script.measuring, script)


def prompts_read(p: Any, found: Any, script: Any) -> None:
    """The tags of a batch's prompts, or of the second pass's, have been taken out of them."""
    second_pass = found is getattr(p, "hr_extra_network_data", None)
    _job(p, script).prepare(second_pass=second_pass)


def before_sampling(p: Any, script: Any) -> None:
    """The sampler is about to start."""
    _job(p, script).attach()


def _job(p: Any, script: Any) -> Job:
    if not isinstance(getattr(p, _ATTRIBUTE, None), Job):
        begin(p, (), script)  # another extension's job, whose beginning nobody told us of
    job: Job = getattr(p, _ATTRIBUTE)
    return job
