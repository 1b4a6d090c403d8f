"""The plan: for every layer two updates, and who acts when. Computed once, before sampling."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from est_lora.config import BETA_UNMEASURED, FusionConfig
from est_lora.errors import EstLoraError, quote
from est_lora.gate.energy import dense_measures, energy_balance, l1_balance
from est_lora.gate.schedule import BOTH, NEEDS_MODEL, NONE, STYLE, SUBJECT, Schedule, Segments, acting, always
from est_lora.lora import LayerId, LoraFile, RelativeUpdate, Update
from est_lora.lora.update import shape_text

# K-LoRA's own; the second, for the pattern s*, times alpha.
_BETA_K_LORA, _BETA_K_LORA_WRAPPED = 0.5, 0.85
# Energies beyond these come from no training: too small counts as zero, too large is refused.
_LEAST_ENERGY, _MOST_ENERGY = 1e-60, 1e60


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What happens in one layer.

    Attributes:
        layer: which one.
        subject, style: the two updates; None where a file doesn't have the layer.
        gated: whether it is one of the layers that the gate decides.
        energy_subject, energy_style: `||dW||_F^2` at strength 1; 0 where there is no update, None where it depends on
            weights of the model that aren't known.
        rho: `E_subject / (gamma * E_style)`; None where either is 0 or None, or there is no gamma.
        segments: who acts from which `tau` on; they cover [0, 1].
    """

    layer: LayerId
    subject: Update | None
    style: Update | None
    gated: bool
    energy_subject: float | None
    energy_style: float | None
    rho: float | None
    segments: Segments

    @property
    def needs_model(self) -> bool:
        """Whether one of its updates depends on weights of the model that aren't known."""
        return any(update is not None and update.needs_model for update in (self.subject, self.style))

    def acts(self, tau: float) -> str:
        """Who acts at `tau`: `subject`, `style`, `both` or `none`."""
        return acting(self.segments, tau)


@dataclass(frozen=True, eq=False)
class FusionPlan:
    """Two files and a request, decided.

    Attributes:
        config: the request.
        subject, style: the files.
        beta: the number that was used for it.
        balance: `gamma`; None where no gated layer has both updates.
        layers: every UNet layer that either file has, in the order of the network.
        text_layers: the same of the text encoders. They have no `tau`: what a file has there always acts.
    """

    config: FusionConfig
    subject: LoraFile
    style: LoraFile
    beta: float
    balance: float | None
    layers: tuple[LayerPlan, ...]
    text_layers: tuple[LayerPlan, ...]

    @classmethod
    def of(
        cls, subject: LoraFile, style: LoraFile, config: FusionConfig, discrepancy: float | None = None
    ) -> FusionPlan:
        """Decides every layer.

        Args:
            subject: one file.
            style: the other.
            config: the knobs.
            discrepancy: the measured style discrepancy `D`, which `beta = auto` uses.

        Raises:
            EstLoraError: a file changes nothing in the UNet, the two have no layer in common, or they are for
                different models.
        """
        _check_has_updates(SUBJECT, subject)
        _check_has_updates(STYLE, style)
        _check_same_model(subject, style)
        schedule = Schedule(config.alpha, _beta(config, discrepancy), config.lean, config.pattern)
        layers = _union(subject.updates, style.updates)
        pairs = [_Pair.of(subject.updates.get(layer), style.updates.get(layer)) for layer in layers]
        gated = [config.layers == "all" or layer.is_attention for layer in layers]
        measures = [
            _Measures.of(*pair.both, is_gated, config) if pair.both else None for pair, is_gated in zip(pairs, gated)
        ]
        balance = _balance(
            [measure.balanced for measure, is_gated in zip(measures, gated) if is_gated and measure], config
        )
        plans = []
        for layer, pair, is_gated, measure in zip(layers, pairs, gated, measures):
            rho = measure.rho(balance) if measure and balance is not None else None
            segments = _segments(pair, is_gated, rho, schedule, config)
            plans.append(LayerPlan(layer, pair.subject, pair.style, is_gated, *pair.energies, rho, segments))
        text = (
            _text_layer(layer, subject, style, schedule, config)
            for layer in _union(subject.text_encoder, style.text_encoder)
        )
        return cls(config, subject, style, schedule.beta, balance, tuple(plans), tuple(text))

    @property
    def only_subject(self) -> list[str]:
        """Names of layers that the style file doesn't have."""
        return [plan.layer.name for plan in self.layers if plan.style is None]

    @property
    def only_style(self) -> list[str]:
        """Names of layers that the subject file doesn't have."""
        return [plan.layer.name for plan in self.layers if plan.subject is None]

    @property
    def remarks(self) -> list[str]:
        """What a user should know: of the files, then of the pair, one sentence each."""
        return [*self.subject.remarks, *self.style.remarks, *self.pair_remarks]

    @property
    def pair_remarks(self) -> list[str]:
        """What a user should know of the plan itself."""
        said = []
        if waiting := sum(layer.needs_model for layer in self.layers):
            said.append(
                f"{waiting} of {len(self.layers)} layers depend on the model's own weights: give the model (--model) to"
                " see what they do; the balance is that of the others."
            )
        return said


class _Pair(NamedTuple):
    """One layer's two updates, and their energies."""

    subject: Update | None
    style: Update | None
    energies: tuple[float | None, float | None]

    @classmethod
    def of(cls, subject: Update | None, style: Update | None) -> _Pair:
        return cls(subject, style, (_energy(subject), _energy(style)))

    @property
    def both(self) -> tuple[Update, Update] | None:
        """The two updates, where both are known to change the layer."""
        return (self.subject, self.style) if self.subject and self.style and all(self.energies) else None

    @property
    def acting(self) -> list[str]:
        """Who changes the layer, or may."""
        return [name for name, energy in zip((SUBJECT, STYLE), self.energies) if energy is None or energy > 0]


class _Measures(NamedTuple):
    """What the two updates of a layer are made comparable by, and what they are compared by."""

    balanced: tuple[float, float]
    compared: tuple[float, float]

    @classmethod
    def of(cls, subject: Update, style: Update, gated: bool, config: FusionConfig) -> _Measures:
        energies = subject.energy, style.energy
        if config.method == "k-lora":
            count = subject.rank * style.rank
            norms, scores = zip(*(dense_measures(update, count) for update in (subject, style)))
            return cls(norms, scores)
        if config.balance == "l1" and gated:
            return cls((dense_measures(subject)[0], dense_measures(style)[0]), energies)
        return cls(energies, energies)

    def rho(self, balance: float) -> float:
        return self.compared[0] / (balance * self.compared[1])


def _union(one: Mapping[LayerId, Update], other: Mapping[LayerId, Update]) -> list[LayerId]:
    return sorted(one.keys() | other.keys(), key=lambda layer: layer.order)


def _text_layer(
    layer: LayerId, subject: LoraFile, style: LoraFile, schedule: Schedule, config: FusionConfig
) -> LayerPlan:
    pair = _Pair.of(subject.text_encoder.get(layer), style.text_encoder.get(layer))
    segments = _segments(pair, False, None, schedule, dataclasses.replace(config, other="sum"))
    return LayerPlan(layer, pair.subject, pair.style, False, *pair.energies, None, segments)


def _energy(update: Update | None) -> float | None:
    if update is None:
        return 0.0
    if update.needs_model:
        return None
    return update.energy if update.energy > _LEAST_ENERGY else 0.0


def _balance(gated: list[tuple[float, float]], config: FusionConfig) -> float | None:
    if not gated:
        return None
    by_energy = config.balance == "energy" and config.method != "k-lora"
    return energy_balance(gated) if by_energy else l1_balance(gated)


def _segments(pair: _Pair, gated: bool, rho: float | None, schedule: Schedule, config: FusionConfig) -> Segments:
    acting = pair.acting
    if config.method in (SUBJECT, STYLE):
        return always(config.method if config.method in acting else NONE)
    if not gated and config.method != "sum" and config.other == "off":
        return always(NONE)
    if len(acting) < 2:
        return always(acting[0] if acting else NONE)
    if not gated or config.method == "sum":
        return always(BOTH)
    return always(NEEDS_MODEL) if rho is None else schedule.segments(rho)


def _beta(config: FusionConfig, discrepancy: float | None) -> float:
    if isinstance(config.beta, float):
        return config.beta
    if config.method == "k-lora":
        return _BETA_K_LORA_WRAPPED * config.alpha if config.pattern == "s*" else _BETA_K_LORA
    return BETA_UNMEASURED if discrepancy is None else discrepancy


def _check_has_updates(role: str, file: LoraFile) -> None:
    name = quote(file.path.name)
    if not file.updates:
        if file.text_encoder:
            holds = f"only a text-encoder part ({len(file.text_encoder)} layers)"
        elif file.base_model:
            holds = f"a LoRA for {file.base_model}, which has no UNet"
        elif file.unreadable:
            holds = "only layers that need the model's own weights, which this model doesn't have or doesn't show"
        elif file.unsupported:
            holds = f"only layers of kinds that can't be applied ({', '.join(file.kinds)})"
        else:
            holds = "no tensor that is known from a LoRA"
        raise EstLoraError(f"{name} can't be the {role}: it holds {holds}, and a fusion happens in a UNet.")
    for layer, update in (*file.updates.items(), *file.text_encoder.items()):
        if update.needs_model or update.energy <= _MOST_ENERGY:
            continue
        if isinstance(update, RelativeUpdate):
            raise EstLoraError(
                f"{name} can't be used: with the model's own weight its update of {layer.name} isn't finite."
            )
        raise EstLoraError(f"{name} is damaged: its update of {layer.name} is too large to be a LoRA's.")


def _check_same_model(subject: LoraFile, style: LoraFile) -> None:
    names = f"{quote(subject.path.name)} and {quote(style.path.name)}"
    if subject.base_model and style.base_model and subject.base_model != style.base_model:
        raise EstLoraError(
            f"{names} are for different models, {subject.base_model} and {style.base_model}: choose two for the same."
        )
    common = [layer for layer in subject.updates if layer in style.updates]
    if not common:
        raise EstLoraError(f"{names} have no layer of the UNet in common, so there is nothing to choose between.")
    for layer in common:
        one, other = subject.updates[layer].shape, style.updates[layer].shape
        if one and other and not subject.updates[layer].fits(other):
            raise EstLoraError(
                f"{names} are for different models: {layer.name} is {shape_text(one)} in one and {shape_text(other)} in"
                " the other; choose two for the same."
            )
