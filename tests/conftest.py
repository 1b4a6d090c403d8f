"""What all tests share."""

from __future__ import annotations

import torch
from hypothesis import settings

# The tensors of the tests are tiny: a second thread costs more than it brings, and sums stay reproducible.
torch.set_num_threads(1)
settings.register_profile("est-lora", deadline=None, derandomize=True)
settings.load_profile("est-lora")
