"""Where the steps of a sampler will begin, told before a picture is made and without a checkpoint."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from est_lora import clock

log = logging.getLogger(__name__)

_TIMESTEPS = 1000


@dataclass(frozen=True)
class Sampling:
    """How a picture will be sampled, by the noise schedule that Stable Diffusion 1 and XL were trained with.

    Attributes:
        sampler, scheduler: as they are called in the WebUI.
        steps: how many are asked for.
        strength: of denoising, in img2img, where the first steps are left out; None in txt2img.
    """

    sampler: str
    scheduler: str | None
    steps: int
    strength: float | None = None

    def taus(self, by: str) -> list[float]:
        """`tau` at the beginning of each step, by the clock `timestep` or `step`.

        Empty for a sampler that chooses its steps as it goes, and for one that isn't understood.
        """
        try:
            steps, left = self._counts()
            taus, has_sigmas = _taus(self.sampler, self.scheduler, steps)
        except Exception:
            log.debug("The steps of %s aren't understood.", self, exc_info=True)
            return []
        if by == "step":
            taus = [number / len(taus) for number in range(len(taus))]
        # Of a list of sigmas the host takes one more than of a list of timesteps.
        return taus[max(len(taus) - left - has_sigmas, 0) :]

    def _counts(self) -> tuple[int, int]:
        """How many steps there are, and how many the host counts as left to do."""
        if self.strength is None:
            return self.steps, _TIMESTEPS
        from modules.sd_samplers_common import setup_img2img_steps

        steps, left = setup_img2img_steps(SimpleNamespace(steps=self.steps, denoising_strength=self.strength))
        return steps, left


def _taus(sampler: str, scheduler: str | None, steps: int) -> tuple[list[float], bool]:
    """`tau` of all steps, and whether the sampler has a list of sigmas; else it has one of timesteps, or none."""
    from modules import sd_models, sd_samplers, sd_samplers_kdiffusion, sd_samplers_timesteps

    if sd_models.model_data.sd_model is None:  # some schedules ask what it is, and that would load it
        return [], False
    config = sd_samplers.find_sampler_config(sampler)
    schedule = _Schedule()
    asks = SimpleNamespace(config=config, model_wrap=schedule)
    job = _job(scheduler)
    has_sigmas = False
    if any(config.name == other.name for other in sd_samplers_timesteps.samplers_data_timesteps):
        timesteps = sd_samplers_timesteps.CompVisSampler.get_timesteps(asks, job, steps).flip(0)
    elif _has_list(config.name, sd_samplers_kdiffusion):
        sigmas = sd_samplers_kdiffusion.KDiffusionSampler.get_sigmas(asks, job, steps)
        timesteps = [schedule.sigma_to_t(sigma) for sigma in sigmas if sigma > 0]
        has_sigmas = True
    else:
        timesteps = []
    return [clock.from_timestep(float(timestep), _TIMESTEPS) for timestep in timesteps], has_sigmas


def has_list(sample: Any) -> bool:
    """Whether a sampler's function is given its noise levels; else it chooses its own."""
    return bool({"sigmas", "sigma_sched", "timesteps"} & inspect.signature(sample).parameters.keys())


def _has_list(name: str, k_diffusion: Any) -> bool:
    sampling = getattr(k_diffusion, "sampling", None) or k_diffusion.k_diffusion.sampling  # the first is reForge's
    for label, function, *_ in k_diffusion.samplers_k_diffusion:
        if label == name:
            named = function if callable(function) else getattr(sampling, function, None)
            return named is None or has_list(named)
    return True


class _Schedule:
    """The noise levels of Stable Diffusion 1 and XL, with as much of k-diffusion's schedule as the hosts' samplers ask for.

    A time is a position among the levels, and between two of them the logarithm of sigma is linear in it.
    """

    def __init__(self) -> None:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, _TIMESTEPS, dtype=torch.float64) ** 2
        alphas = torch.cumprod(1 - betas, 0)
        self.sigmas = ((1 - alphas) / alphas).sqrt().float()
        self.log_sigmas = self.sigmas.log()
        self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]

    def get_sigmas(self, n: int) -> Tensor:
        times = torch.linspace(_TIMESTEPS - 1, 0, n)
        return torch.cat([self.t_to_sigma(times), torch.zeros(1)])

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        return torch.as_tensor(np.interp(sigma.log(), self.log_sigmas, np.arange(_TIMESTEPS))).float()

    def t_to_sigma(self, t: Tensor) -> Tensor:
        return torch.as_tensor(np.interp(t, np.arange(_TIMESTEPS), self.log_sigmas)).float().exp()


def _job(scheduler: str | None) -> Any:
    """As much of a job as the hosts' samplers ask of one."""
    return SimpleNamespace(
        is_hr_pass=False,
        scheduler=scheduler,
        sampler_noise_scheduler_override=None,
        extra_generation_params={},
        sd_model=SimpleNamespace(is_webui_legacy_model=lambda: True),
    )
