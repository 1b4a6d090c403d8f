"""One generation: what was asked for, and what it puts on the model and takes off again."""

from __future__ import annotations

import copy
import dataclasses
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from est_lora import report
from est_lora.config import BETA_UNMEASURED, FusionConfig
from est_lora.errors import EstLoraError, explained, quote
from est_lora.fusion import FusionSession, remove_fusion
from est_lora.gate import FusionPlan
from est_lora.hosts.webui import axes, infotext, request, settings
from est_lora.hosts.webui.a1111 import A1111Host
from est_lora.hosts.webui.forge import ForgeHost
from est_lora.hosts.webui.host import Host, device_of, progress, step_starts, unwrapped_model
from est_lora.hosts.webui.loras import LoraList
from est_lora.hosts.webui.measuring import Measuring, key_of, memory
from est_lora.hosts.webui.plans import Plans
from est_lora.hosts.webui.probes import Stopped
from est_lora.text import tag

log = logging.getLogger(__name__)

# The tags of a prompt are part of what the host remembers an encoded prompt by; this is what we add to them.
_ENCODED_WITH = "est-lora text encoders"
_RESTORES = "est_lora_restores"
_CANT_MEASURE = "The style discrepancy can't be measured"
_UNMEASURED = f"For beta {BETA_UNMEASURED:g} is taken."
_REFINED = "The refiner drew its part without EST-LoRA: a plan is made for one checkpoint."


def host_of(p: Any) -> Host:
    """The WebUI that `p` is a job of."""
    return ForgeHost(p.sd_model) if hasattr(p.sd_model, "forge_objects") else A1111Host(p.sd_model)


@dataclass(frozen=True)
class Fusion:
    """A request that can be carried out on the checkpoint that is loaded.

    Attributes:
        host: that checkpoint.
        plan: what every layer does.
        subject, style: the host's entries of the two files.
    """

    host: Host
    plan: FusionPlan
    subject: Any
    style: Any


class Job:
    """What a generation `p` does with two LoRAs. It hangs on `p`, and nothing of it is anywhere else but `plans`.

    Attributes:
        session: what is on the UNet at the moment; None between samplings.
        is_sampling: whether the host is between the beginning of the first pass and the end of the last.
        done: the plan of the first pass, and every `tau` at which it was asked; None where there was no fusion.
    """

    def __init__(self, p: Any, given: Mapping[str, object], plans: Plans) -> None:
        """Notes what the panel or the API asks for, by the keys of the knobs; nothing where it is switched off."""
        self._p = p
        self._given = given
        self._plans = plans
        self.session: FusionSession | None = None
        self.is_sampling = False
        self.done: tuple[FusionPlan, list[float]] | None = None
        self._second_pass = False
        self._fusion: Fusion | None = None
        self._discrepancies: dict[tuple[str, str], float | None] = {}
        self._text = ExitStack()
        self._sampling = ExitStack()

    def measure(self, measuring: Measuring, script: Any) -> None:
        """The prompts of a batch are about to be read: other pictures may go first, if the discrepancy isn't known."""
        p = self._p
        try:
            config = self._expected()
            if config is None or not config.takes_discrepancy:
                return
            loras = LoraList()
            subject, style = (loras.find(name) for name in config.pair())
        except EstLoraError:  # said when they have been read
            return
        found: float | None = None
        try:
            found = measuring.of(p, script, subject, style)
        except Stopped:
            pass
        except Exception as error:  # noqa: BLE001 - a picture is worth more than a number
            self.say(f"{explained(error, _CANT_MEASURE)} {_UNMEASURED}")
        self._discrepancies[subject.filename, style.filename] = found

    def prepare(self, *, second_pass: bool = False) -> None:
        """The prompts of a batch, or of a hires fix's second pass, have been read.

        Decides what will be done, and has text encoded accordingly. From here to the end of sampling the model is
        changed; a second pass is within the first one's guard.
        """
        was_fused = self.session is not None
        self.release()
        p = self._p
        _tidy(p)
        _mark(p, None, second_pass)
        if self.is_sampling and not second_pass:  # Forge reads them once more when it has loaded a refiner
            if was_fused:
                self.say(_REFINED)
            return
        self._second_pass = second_pass
        tags: Mapping[str, Sequence[Any]] = p.hr_extra_network_data if second_pass else p.extra_network_data
        heeded = {} if p.disable_extra_networks else tags
        if not second_pass:
            self.done = None
            infotext.clear(p)
            unguard(p)
            if self._given or axes.chosen(p) or tag.NAME in heeded or getattr(p, "enable_hr", False):
                guard(p, self)
        try:
            knobs = _asked(p, self._given, heeded, [*(p.hr_prompts if second_pass else p.prompts), *p.negative_prompts])
            config = FusionConfig.of(knobs) if knobs else None
            if config is None or not config.enabled:
                return
            config = _for_pass(config, second_pass=second_pass)
            if config is None:
                return
            fusion = self._fusion_of(config)
            missing = self._text.enter_context(fusion.host.encoding(fusion.plan))
        except Exception as error:  # noqa: BLE001 - a picture is worth more than a fusion
            self._refuse(error)
            return
        self._fusion = fusion
        if fusion.plan.text_layers:
            _mark(p, _encoded_with(fusion), second_pass)
        if not second_pass:
            infotext.write(p, fusion.plan, fusion.subject, fusion.style)
        for remark in [*_counted_twice(fusion, heeded), *_text_remarks(missing)]:
            self.say(remark)

    def attach(self) -> None:
        """The sampler is about to start: from here on the UNet has both LoRAs."""
        p, fusion = self._p, self._fusion
        self._text.close()
        self._sampling.close()
        _tidy(p)
        if fusion is None:
            return
        try:
            if getattr(p, "is_hr_pass", False) and not self._second_pass:  # the host disregards tags, and told nobody
                config = _for_pass(fusion.plan.config, second_pass=True)
                if config is None:
                    return
                fusion = self._fusion_of(config)
            host = host_of(p)
            if fusion.host.unet is not host.unet or fusion.host.checkpoint is not host.checkpoint:
                fusion = self._fusion_of(fusion.plan.config)  # a hires fix with a checkpoint of its own
            self._attach(fusion)
        except Exception as error:  # noqa: BLE001 - as above
            self._refuse(error)

    def release(self) -> None:
        """Takes everything off the model. May be called at any time, and again."""
        self._fusion = None
        self._text.close()
        self._sampling.close()
        self.session = None

    def say(self, sentence: str) -> None:
        """Tells the user, under the picture and in the log, once."""
        if sentence not in self._p.comments:
            self._p.comment(sentence)
            log.warning("%s", sentence)

    def _attach(self, fusion: Fusion) -> None:
        host, plan = fusion.host, fusion.plan
        starts = step_starts(host, self._p) if plan.config.clock == "step" else []
        if plan.config.clock == "step" and not starts:
            self.say(f"{self._p.sampler_name} has no list of steps: EST-LoRA takes the timestep for its clock.")
        # A refiner may be loaded into the same modules, and would be taken for what the weights were.
        keeps = getattr(self._p, "refiner_checkpoint_info", None) is None
        session = FusionSession(
            unwrapped_model(host.unet),
            plan,
            modules=host.modules,
            originals=settings.originals(),
            may_merge=lambda module: keeps and host.settle(module),
        )
        with ExitStack() as attached:
            attached.enter_context(_uncompiled())
            attached.enter_context(session)
            _end_with_sampling(self._p.sampler, session)
            hook = Progress(session, host, starts)
            attached.callback(host.unet.register_forward_pre_hook(hook, with_kwargs=True).remove)
            attached.callback(self._look_back, session, host)
            self._sampling = attached.pop_all()
        self.session = session
        self.done = self.done or (plan, hook.taus)
        if log.isEnabledFor(logging.INFO):
            log.info("%s", report.summary(plan))
            log.debug("%s", report.table(plan))
        for remark in session.remarks:
            self.say(remark)

    def _look_back(self, session: FusionSession, host: Host) -> None:
        """Sampling is over: what of it went another way than the user may think."""
        p = self._p
        loaded = getattr(p.sd_model, "sd_checkpoint_info", None)
        if loaded is not host.checkpoint and loaded is getattr(p, "refiner_checkpoint_info", None):
            self.say(_REFINED)
        elif session.tau is not None and not session.ran:
            self._refuse(
                EstLoraError(
                    "EST-LoRA had no effect: this UNet runs in a compiled form that passes its layers by; switch"
                    " torch.compile or the like off."
                )
            )

    def _expected(self) -> FusionConfig | None:
        """What the prompts of the batch will ask for, before the host has read them."""
        p = self._p
        tagged = {} if p.disable_extra_networks else request.of_tags(tag.find(p.prompts[0] if p.prompts else ""))
        knobs = request.combined(self._given, tagged, axes.chosen(p))
        config = FusionConfig.of(knobs) if knobs else None
        return config if config is not None and config.enabled else None

    def _discrepancy(self, host: Host, subject: Any, style: Any) -> float | None:
        """As it was measured for this job, or as it is remembered: a second pass may have a pair of its own."""
        pair = (subject.filename, style.filename)
        if pair not in self._discrepancies:
            with suppress(EstLoraError):
                key = key_of(host.sd_model, subject, style, self._p.prompts[0])
                self._discrepancies[pair] = memory().find(key)
        return self._discrepancies.get(pair)

    def _fusion_of(self, config: FusionConfig) -> Fusion:
        host = host_of(self._p)
        loras = LoraList()
        subject, style = map(loras.find, config.pair())
        if subject.filename == style.filename:
            raise EstLoraError(
                f"Subject and style are the same file, {quote(Path(subject.filename).name)}: name two, or use <lora:> for"
                " one alone."
            )
        if host.obstacle:
            raise EstLoraError(host.obstacle)
        discrepancy = self._discrepancy(host, subject, style) if config.takes_discrepancy else None
        plan = self._plans.of(subject.filename, style.filename, config, discrepancy, host)
        for entry in (subject, style):
            entry.read_hash()
        return Fusion(host, plan, subject, style)

    def _refuse(self, error: Exception) -> None:
        why = explained(error)
        self._fusion = None
        self._text.close()
        is_second = self._second_pass or getattr(self._p, "is_hr_pass", False)
        if not is_second:
            self.done = None
            infotext.refuse(self._p, why)
        self.say(f"{why} The {'second pass' if is_second else 'picture'} was made without EST-LoRA.")


class Progress:
    """The hook on the UNet that tells a session, at each call, where the picture is.

    Attributes:
        taus: where it has been.
    """

    def __init__(self, session: FusionSession, host: Host, starts: list[float]) -> None:
        self.taus: list[float] = []
        self._session = session
        self._host = host
        self._starts = starts
        self._merged = host.merged

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward pre-hook."""
        if not self._session.attached:
            return
        if self._host.still_loaded():
            tau = progress(self._host, self._starts, args, kwargs)
            self.taus.append(tau)
            if self._host.merged != self._merged:
                self._merged = self._host.merged
                self._session.unmerge()
            self._session.at(tau, device_of(args))
        else:
            self._session.detach()


def _end_with_sampling(sampler: Any, session: FusionSession) -> None:
    """Has the weights be given back when the sampler is done: what a host does next may be to move or exchange them."""
    # All of the hosts' own have it, and they are made anew for each pass.
    launch = getattr(sampler, "launch_sampling", None)
    if launch is None:
        return

    def launched(*args: Any, **kwargs: Any) -> Any:
        try:
            return launch(*args, **kwargs)
        finally:
            session.detach()

    sampler.launch_sampling = launched


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Models run as they are: compiled code passes hooks by, or would have to be made anew for each picture."""
    dynamo: Any = sys.modules.get("torch._dynamo")  # until it is loaded, nothing is compiled
    if hasattr(dynamo, "set_stance"):
        with dynamo.set_stance("force_eager"):
            yield
        return
    if dynamo is not None:  # torch before 2.6
        dynamo.reset()
    try:
        yield
    finally:
        if dynamo is not None:
            dynamo.reset()


def _tidy(p: Any) -> None:
    """Takes off the model what a fusion that ended badly has left there."""
    with suppress(AttributeError):  # of a model that is built otherwise, and can't have anything of ours
        host = host_of(p)
        hooks = host.unet._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, Progress)]:
            del hooks[key]
            host.unet._forward_pre_hooks_with_kwargs.pop(key, None)
        if remove_fusion(host.unet) + host.tidy():
            log.warning("An earlier fusion was still on the model; it has been taken off.")


def guard(p: Any, job: Job) -> None:
    """Has the next `p.sample(...)` end with `job` released, however it ends: the host calls nobody after an error."""
    sample, was_there = p.sample, "sample" in vars(p)

    def guarded(*args: Any, **kwargs: Any) -> Any:
        unguard(p)
        job.is_sampling = True
        try:
            return sample(*args, **kwargs)
        finally:
            job.is_sampling = False
            job.release()

    setattr(guarded, _RESTORES, sample if was_there else None)
    p.sample = guarded


def unguard(p: Any) -> None:
    """Takes a guard off, where there is one."""
    if hasattr(p.sample, _RESTORES):
        before = getattr(p.sample, _RESTORES)
        del p.sample
        if before is not None:
            p.sample = before


def _asked(
    p: Any, given: Mapping[str, object], tags: Mapping[str, Sequence[Any]], texts: Sequence[str]
) -> dict[str, object]:
    """All that is asked of a pass; `texts` are the prompts after the host has taken the tags out."""
    request.check_all_read(texts)
    tagged = request.of_tags([tag.read(params.items) for params in tags.get(tag.NAME, ())])
    return request.combined(given, tagged, axes.chosen(p))


def _for_pass(config: FusionConfig, *, second_pass: bool) -> FusionConfig | None:
    if not second_pass or config.hires == "same":
        return config
    return None if config.hires == "off" else dataclasses.replace(config, method=config.hires)


def _encoded_with(fusion: Fusion) -> str:
    config = fusion.plan.config
    files = (
        (Path(entry.filename), Path(entry.filename).stat().st_mtime_ns) for entry in (fusion.subject, fusion.style)
    )
    # The checkpoint too: a refiner's prompts are encoded under the same tags, and without us.
    return repr(
        (config.method, config.subject_te, config.style_te, getattr(fusion.host.checkpoint, "name", None), *files)
    )


def _mark(p: Any, encoded_with: str | None, second_pass: bool) -> None:
    """Writes into the tags what text is encoded with, by which the host remembers it.

    Always into a new dict: the old one may be what an encoded prompt is remembered by already. The first pass's goes to
    the second one's tags too: a setting of the host has it encode both at once.
    """
    for name in ("hr_extra_network_data",) if second_pass else ("extra_network_data", "hr_extra_network_data"):
        if (tags := getattr(p, name, None)) is not None:
            marked = copy.copy(tags)
            marked.pop(_ENCODED_WITH, None)
            if encoded_with is not None:
                # A host that disregards tags doesn't tell when it encodes for the second pass: that is like nothing else.
                is_unknown = p.disable_extra_networks and name.startswith("hr_")
                marked[_ENCODED_WITH] = [object() if is_unknown else encoded_with]
            setattr(p, name, marked)


def _counted_twice(fusion: Fusion, tags: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    loras = LoraList()
    for params in tags.get("lora", ()):
        for role, entry in (("subject", fusion.subject), ("style", fusion.style)):
            if params.positional and loras.same_file(params.positional[0], entry):
                yield (
                    f"The {role} {quote(entry.name)} is also in the prompt as <lora:...>: it counts twice; take that tag"
                    " out."
                )


def _text_remarks(missing: list[str]) -> Iterator[str]:
    if missing:
        yield (
            "Text-encoder layers of the files that this checkpoint doesn't have are left out:"
            f" {len(missing)}, e.g. {missing[0]}."
        )
