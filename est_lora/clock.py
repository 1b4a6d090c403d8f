"""The clock: a noise level becomes `tau`, the progress of denoising (0 = pure noise, 1 = clean picture).

Every function is pure: `tau` depends on the noise level that the model was called with and on nothing before it.
"""

from __future__ import annotations

from collections.abc import Iterable


def from_timestep(timestep: float, train_timesteps: int = 1000) -> float:
    """`tau` of a discrete-time model (epsilon, v and x0 prediction): `clip(1 - t / (T - 1), 0, 1)`.

    Args:
        timestep: `t`, the timestep the UNet is called with; may be fractional.
        train_timesteps: `T`, how many timesteps the model was trained with.
    """
    return _clip(1.0 - timestep / max(train_timesteps - 1, 1))


def from_flow_sigma(sigma: float) -> float:
    """`tau` of a flow model: `1 - sigma`, sigma in [0, 1]."""
    return _clip(1.0 - sigma)


def from_step(level: float, levels: Iterable[float]) -> float:
    """`tau` as the paper counts it, step / steps, read off the noise level so that it needs no counter.

    Args:
        level: the sigma or timestep of this call.
        levels: where the sampler's steps begin: its full, untruncated list of sigmas or timesteps without the closing
            zero. A value that stands there twice (samplers that call the model twice a step) counts once.

    Returns:
        The position of `level` in the list, interpolated between its neighbours, over the number of steps; below the
        last one, interpolated towards 1 at `level` 0.
    """
    starts = sorted({float(value) for value in levels}, reverse=True)
    level = max(level, 0.0)
    if not starts or level >= starts[0]:
        return 0.0
    if level < starts[-1]:
        position = len(starts) - level / starts[-1]
    else:
        below = next(index for index, start in enumerate(starts) if start <= level)
        position = below - (level - starts[below]) / (starts[below - 1] - starts[below])
    return position / len(starts)


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)
