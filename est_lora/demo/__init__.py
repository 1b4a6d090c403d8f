"""The embedded model: a drawn world, a small diffusion model of it, four LoRAs, and how they were trained."""
