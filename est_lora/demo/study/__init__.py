"""The study of the style discrepancy: how much `D` varies with the probe's seed, prompt, steps and side."""
