"""What samples in the hosts: noise schedules, samplers, and the denoiser that calls the UNet for them."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tests.hosts.webui import fakes

if TYPE_CHECKING:
    from tests.hosts.webui.host import Processing

_BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS = torch.cumprod(1 - _BETAS, 0).float()
SIGMAS = ((1 - ALPHAS) / ALPHAS) ** 0.5


class Predictor(nn.Module):
    """Forge's: sigmas and timesteps."""

    prediction_type = "epsilon"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sigmas", SIGMAS)

    def timestep(self, sigma: Tensor) -> Tensor:
        return (sigma.log() - self.sigmas.log()[:, None]).abs().argmin(0).view(sigma.shape)

    def sigma(self, timestep: Tensor) -> Tensor:
        return _at(self.sigmas.log(), timestep).exp()


class FlowPredictor(nn.Module):
    """Forge's for flow models."""

    prediction_type = "const"

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma * 1000

    def sigma(self, timestep: Tensor) -> Tensor:
        return timestep / 1000


def _is_flow(p: Any) -> bool:
    web = getattr(p, "web", None)
    return bool(web and web.is_forge and isinstance(web.sd_model.forge_objects.unet.model.predictor, FlowPredictor))


def to_timestep(sigma: Tensor, sigmas: Tensor = SIGMAS) -> Tensor:
    """Interpolated: A1111's timesteps are fractional."""
    logs, wanted = sigmas.log(), sigma.reshape(-1).log()
    high = torch.searchsorted(logs, wanted).clamp(1, 999)
    low = high - 1
    part = ((wanted - logs[low]) / (logs[high] - logs[low])).clamp(0, 1)
    return (low + part).reshape(sigma.shape)


def _at(values: Tensor, index: Tensor) -> Tensor:
    index = index.float().clamp(0, len(values) - 1)
    low, high, part = index.floor().long(), index.ceil().long(), index.frac()
    return values[low] * (1 - part) + values[high] * part


@dataclass
class Call:
    """One call of the UNet."""

    p: Any
    second_pass: bool
    timestep: float
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Tensor
    unet: nn.Module


class Denoiser:
    """Classifier-free guidance around the UNet: one call for both halves."""

    def __init__(self, p: Processing, cond: Tensor, uncond: Tensor, timestep: Any) -> None:
        self.p, self.cond, self.uncond, self.timestep, self.step = p, cond, uncond, timestep, 0

    def __call__(self, x: Tensor, level: Tensor) -> Tensor:
        p, web = self.p, self.p.web
        self._switch_to_refiner()
        if self.step == p.fails_at:
            raise RuntimeError("out of memory")
        self.step += 1
        timestep, sigma = (value.reshape(1).repeat(2) for value in self.timestep(p, level))
        args, kwargs = (torch.cat([x, x]), timestep), {"context": torch.cat([self.cond, self.uncond])}
        if web.is_forge:
            kwargs |= {"control": None, "transformer_options": {"sigmas": sigma}}
        elif web.sd_model.is_sdxl:
            args, kwargs = args[:1], kwargs | {"timesteps": timestep, "y": None}
        unet = web.unet
        out = unet(*args, **kwargs)
        web.calls.append(Call(p, p.is_hr_pass, float(timestep[0]), args, kwargs, out.clone(), unet))
        with_prompt, without = out.chunk(2)
        return without + 3 * (with_prompt - without)

    def _switch_to_refiner(self) -> None:
        p, web = self.p, self.p.web
        if (
            p.refiner is None
            or p.is_hr_pass not in p.refines_pass
            or self.step != p.refiner_at
            or web.sd_model.sd_checkpoint_info is p.refiner_checkpoint_info
        ):
            return
        p.refiner()
        if web.is_forge and not p.disable_extra_networks:
            web.activate(p, p.extra_network_data)
        p.setup_conds()
        self.cond, self.uncond = (p.hr_c, p.hr_uc) if p.is_hr_pass else (p.c, p.uc)


def euler(model, x, sigmas=None):
    """By a list of sigmas."""
    for sigma, following in zip(sigmas[:-1], sigmas[1:]):
        x = x + model(x, sigma) * (following - sigma) * 0.1
    return x


def heun(model, x, sigmas=None):
    """Two calls a step."""
    for sigma, following in zip(sigmas[:-1], sigmas[1:]):
        first = model(x, sigma)
        if following > 0:
            first = (first + model(x, following)) / 2
        x = x + first * (following - sigma) * 0.1
    return x


def adaptive(model, x, sigma_min=None, sigma_max=None):
    """Chooses its own noise levels, also back and forth."""
    for share in (1.0, 0.6, 0.8, 0.4, 0.1):
        x = x - model(x, torch.tensor(float(SIGMAS[-1])) * share) * 0.1
    return x


def ddim(model, x, timesteps=None):
    """By a list of timesteps."""
    for timestep in timesteps.flip(0):
        x = x - model(x, timestep) * 0.1
    return x


_SIGMA_SAMPLERS = (
    ("Euler", "euler", {}),
    ("Heun", heun, {}),
    ("DPM2", "heun", {"scheduler": "karras", "discard_next_to_last_sigma": True}),
    ("DPM adaptive", "adaptive", {}),
)
_CONFIGS = {
    name: SimpleNamespace(name=name, func=function if callable(function) else globals()[function], options=options)
    for name, function, options in (*_SIGMA_SAMPLERS, ("DDIM", ddim, {}))
}


def sampler_of(p: Processing) -> Any:
    config = _CONFIGS[p.sampler_name]
    sampler = (TimestepSampler if p.sampler_name == "DDIM" else SigmaSampler)(config.func)
    sampler.config = config
    return sampler


def sampler_modules() -> list[ModuleType]:
    """The modules in which the hosts have their samplers, and what asks for them before a picture is made."""
    names = ("sd_models", "sd_samplers", "sd_samplers_kdiffusion", "sd_samplers_timesteps")
    models, samplers, sigmas, timesteps = (ModuleType(f"modules.{name}") for name in names)
    samplers.find_sampler_config = _CONFIGS.get
    samplers.all_samplers = [*_CONFIGS.values()]
    sigmas.samplers_k_diffusion = [(name, function, [], options) for name, function, options in _SIGMA_SAMPLERS]
    sigmas.KDiffusionSampler = SigmaSampler
    sigmas.k_diffusion = SimpleNamespace(sampling=SimpleNamespace(euler=euler, heun=heun, adaptive=adaptive))
    timesteps.samplers_data_timesteps, timesteps.CompVisSampler = [_CONFIGS["DDIM"]], TimestepSampler
    return [models, samplers, sigmas, timesteps]


class Schedule:
    """k-diffusion's."""

    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas = sigmas

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        return to_timestep(sigma, self.sigmas)

    def get_sigmas(self, steps: int) -> Tensor:
        return torch.cat([_at(self.sigmas.log(), torch.linspace(999, 0, steps)).exp(), torch.zeros(1)])


def karras(steps: int, low: float, high: float) -> Tensor:
    """Evenly spaced in the seventh root."""
    roots = torch.linspace(high ** (1 / 7), low ** (1 / 7), steps)
    return torch.cat([roots**7, torch.zeros(1)])


class Sampler:
    """What all of the hosts' have."""

    def launch_sampling(self, steps: int, func: Any) -> Tensor:
        return func()


class SigmaSampler(Sampler):
    """k-diffusion's."""

    def __init__(self, func: Any) -> None:
        self.func = func
        self.model_wrap = Schedule(SIGMAS)

    def get_sigmas(self, p: Processing, steps: int) -> Tensor:
        if _is_flow(p):
            return torch.linspace(1, 0, steps + 1)
        discards = self.config.options.get("discard_next_to_last_sigma", False)
        steps += discards
        scheduler = (p.hr_scheduler if p.is_hr_pass else p.scheduler) or "Automatic"
        if scheduler == "Automatic":
            scheduler = self.config.options.get("scheduler")
        if p.sampler_noise_scheduler_override:
            sigmas = p.sampler_noise_scheduler_override(steps)
        elif scheduler in ("karras", "Karras"):
            p.extra_generation_params["Schedule type"] = "Karras"
            sigmas = karras(steps, float(self.model_wrap.sigmas[0]), float(self.model_wrap.sigmas[-1]))
        else:
            sigmas = self.model_wrap.get_sigmas(steps)
        return torch.cat([sigmas[:-2], sigmas[-1:]]) if discards else sigmas

    def run(self, p: Processing, x: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
        second = p.is_hr_pass or hasattr(p, "init_images")
        if second:
            steps, done = fakes.setup_img2img_steps(p, (p.hr_second_pass_steps or p.steps) if p.is_hr_pass else None)
            sigmas = self.get_sigmas(p, steps)[steps - done - 1 :]
        else:
            sigmas = self.get_sigmas(p, p.steps)
        denoiser = Denoiser(p, cond, uncond, self._timestep)
        given = {} if self.func is adaptive else {"sigmas": sigmas}
        return self.launch_sampling(len(sigmas) - 1, lambda: self.func(denoiser, x, **given))

    def _timestep(self, p: Processing, sigma: Tensor) -> tuple[Tensor, Tensor]:
        predictor = p.web.sd_model.forge_objects.unet.model.predictor if p.web.is_forge else None
        return (to_timestep(sigma) if predictor is None else predictor.timestep(sigma).float()), sigma


class TimestepSampler(Sampler):
    """DDIM and its kin."""

    def __init__(self, func: Any) -> None:
        self.func = func

    def get_timesteps(self, p: Processing, steps: int) -> Tensor:
        return (torch.arange(0, 1000, 1000 // steps) + 1).clip(0, 999)

    def run(self, p: Processing, x: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
        timesteps = self.get_timesteps(p, p.steps)
        if p.is_hr_pass or hasattr(p, "init_images"):
            timesteps = timesteps[: fakes.setup_img2img_steps(p, p.steps if p.is_hr_pass else None)[1]]
        denoiser = Denoiser(p, cond, uncond, self._timestep)
        return self.launch_sampling(len(timesteps), lambda: self.func(denoiser, x, timesteps=timesteps))

    def _timestep(self, p: Processing, timestep: Tensor) -> tuple[Tensor, Tensor]:
        return timestep.float(), _at(SIGMAS.log(), timestep.float()).exp()
