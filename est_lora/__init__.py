"""EST-LoRA: a subject LoRA and a style LoRA fused while the picture is made, without training."""

__version__ = "0.1.0"
