"""Real Stable Diffusion pipelines, tiny and with random weights, and LoRAs that fit them."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from est_lora.demo.model import WORDS_PER_PROMPT, make_tokenizer
from tests.files import Factors, Lora
from tests.models import SD15, SDXL, narrow, projections

SIZE = 32


def _vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.18215,
    ).eval()


def _text_config(width: int = 32) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=200,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=WORDS_PER_PROMPT,
        projection_dim=width,
        eos_token_id=2,
        bos_token_id=1,
    )


def stable_diffusion(image_to_image: bool = False) -> StableDiffusionPipeline:
    """SD1.5's layout; pictures of 32 x 32 from latents of 16 x 16."""
    unet = narrow(SD15)
    torch.manual_seed(2)
    kind = StableDiffusionImg2ImgPipeline if image_to_image else StableDiffusionPipeline
    pipe = kind(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config()).eval(),
        tokenizer=make_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion_xl(image_to_image: bool = False, second_width: int = 32) -> StableDiffusionXLPipeline:
    """SDXL's layout: two text encoders, pooled and size embeddings, deeper transformers."""
    torch.manual_seed(3)
    unet = narrow(
        SDXL,
        cross_attention_dim=32 + second_width,
        transformer_layers_per_block=(1, 1, 2),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=second_width + 6 * 8,
    )
    kind = StableDiffusionXLImg2ImgPipeline if image_to_image else StableDiffusionXLPipeline
    pipe = kind(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config()).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(second_width)).eval(),
        tokenizer=make_tokenizer(),
        tokenizer_2=make_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fitting_lora(
    unet, seed: int, rank: int = 4, alpha: float | None = 2.0, size: float = 0.15, only: str = ".attn"
) -> Lora:
    """Random factors for every projection of `unet` whose name contains `only`."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, module in projections(unet).items():
        if only not in name:
            continue
        out, inputs, *kernel = module.weight.shape
        down = torch.randn(rank, inputs, *kernel, generator=generator) / inputs**0.5
        up = torch.randn(out, rank, *(1 for _ in kernel), generator=generator)
        spread = float(torch.exp(torch.randn((), generator=generator) * 0.6))
        made[name] = Factors(down, up * size * spread, alpha)
    return made
