"""The demo's model: an unmodified `StableDiffusionPipeline` made of very small parts.

The UNet, the text encoder and the schedulers are the ordinary ones. In the VAE's place stands a pixel shuffle, so that
latents are the picture's own pixels: 64 x 64 x 3 becomes 16 x 16 x 48. The UNet predicts the clean picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from est_lora.demo.styles import BACKGROUNDS, COLOURS, FILLS, LINES, NEW_STYLES, SIZE, TONES
from est_lora.demo.things import SUBJECTS, THINGS
from est_lora.demo.world import FILLERS, PART_WORDS, RARE_WORDS, STYLE, SUBJECT

WEIGHTS = Path(__file__).parent / "weights"
BASE = WEIGHTS / "base"
LORAS = {words: WEIGHTS / f"{words.split()[0]}.safetensors" for words in (*list(SUBJECTS)[:2], *list(NEW_STYLES)[:2])}
"""The embedded LoRAs, by the words that mean what they teach."""
SUBJECT_LORA = LORAS[SUBJECT]
STYLE_LORA = LORAS[STYLE]

GUIDANCE = 2.5
"""The guidance scale that suits this model; Stable Diffusion's usual 7.5 burns its colours."""

UNKNOWN = "<unk>"
FACTOR = 4
WORDS_PER_PROMPT = 24
WIDTH = 96


@dataclass(frozen=True)
class ExactLatents:
    """A distribution with one point, so that the shuffle looks like a VAE to a pipeline.

    Attributes:
        latents: shape (batch, 48, height / 4, width / 4).
    """

    latents: torch.Tensor

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """The latents; the generator is not used."""
        return self.latents

    def mode(self) -> torch.Tensor:
        """The latents."""
        return self.latents


class PixelShuffle(ModelMixin, ConfigMixin):
    """Stands in the VAE's place: moves 4 x 4 pixels into channels and back, without loss and without weights.

    Args:
        latent_channels: 3 * 4 * 4.
        block_out_channels: only its length counts: pipelines take `2 ** (length - 1)` pixels for one latent.
        scaling_factor: pipelines multiply latents by it.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 3 * FACTOR**2,
        block_out_channels: tuple[int, ...] = (3, 12, 48),
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        # A module without a tensor has no dtype and no device that a pipeline could ask for, and no file to save.
        self.register_buffer("unit", torch.ones(1))

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[ExactLatents]:
        """Pixels (batch, 3, height, width) in [-1, 1] to latents."""
        latents = ExactLatents(pixel_unshuffle(x, FACTOR))
        return AutoencoderKLOutput(latent_dist=latents) if return_dict else (latents,)

    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Latents (batch, 48, height / 4, width / 4) to pixels in about [-1, 1]."""
        pixels = pixel_shuffle(z, FACTOR)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the demo's world; any other word is `UNKNOWN`, punctuation is nothing."""
    special = ["<pad>", "<bos>", "<eos>", UNKNOWN]
    known = [*THINGS, *COLOURS, *FILLS, *LINES, *TONES, *BACKGROUNDS, *PART_WORDS, *FILLERS, *RARE_WORDS]
    words = dict.fromkeys([*special, *known])  # each once
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\p{L}\p{N}<>]+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=WORDS_PER_PROMPT,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token=UNKNOWN,
    )


def make_pipeline() -> StableDiffusionPipeline:
    """The pipeline with fresh weights, drawn from torch's global generator."""
    tokenizer = make_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=WORDS_PER_PROMPT,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    vae = PixelShuffle()
    unet = UNet2DConditionModel(
        sample_size=SIZE // FACTOR,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=(64, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type="sample",
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # both as Stable Diffusion pipelines ask for
    )
    return _assemble(vae, text_encoder, tokenizer, unet, scheduler)


def load_pipeline(folder: str | Path | None = None) -> StableDiffusionPipeline:
    """Loads a model that `python -m est_lora.demo.train base` made, in float32 on the CPU.

    Args:
        folder: a pipeline in diffusers' folder format; None for the embedded one.
    """
    path = str(BASE if folder is None else folder)
    return _assemble(
        PixelShuffle.from_pretrained(path, subfolder="vae", torch_dtype=torch.float32),
        CLIPTextModel.from_pretrained(path, subfolder="text_encoder", dtype=torch.float32),
        PreTrainedTokenizerFast.from_pretrained(path, subfolder="tokenizer"),
        UNet2DConditionModel.from_pretrained(path, subfolder="unet", torch_dtype=torch.float32),
        DDIMScheduler.from_pretrained(path, subfolder="scheduler"),
    )


def _assemble(
    vae: PixelShuffle,
    text_encoder: CLIPTextModel,
    tokenizer: PreTrainedTokenizerFast,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
) -> StableDiffusionPipeline:
    # The constructor, unlike from_pretrained, doesn't remark on a VAE that isn't an AutoencoderKL.
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
