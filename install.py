"""Nothing to install: the hosts ship torch, safetensors, numpy and gradio."""
