"""The embedded model: a drawn world, a small diffusion model of it, two LoRAs, and how they were trained."""
