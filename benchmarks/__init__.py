"""What the fusion costs, in time and in memory, beside the ways in which EST-LoRA and K-LoRA were published.

`python3 run.py benchmark` measures it. Results worth quoting are kept in `benchmarks/results/`, a `.md` and a `.json` a
machine, as the command wrote them.
"""
