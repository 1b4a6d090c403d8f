"""Runs the demo, the tests or the benchmark in a virtual environment of its own, with exactly pinned packages.

python3 run.py demo           draws the demonstration with the embedded model
python3 run.py lab            measures how well fusions do with the embedded model, and writes a report (hours on a CPU;
                              python3 run.py lab --quick makes a smaller one in a quarter of an hour)
python3 run.py test           runs the checks and the whole test suite
python3 run.py test-oldest    runs the tests of what lies below the hosts with the oldest torch that hosts still pin
                              (Python 3.10 or 3.11; downloads gigabytes)
python3 run.py benchmark      times pictures of UNets of SD1.5's and SDXL's size without LoRAs and with two, applied in
                              every way there is, and the planning of a pair of files (on a CPU hours, and 20 GB of
                              memory; less of it with what python3 run.py benchmark --help tells)
python3 run.py benchmark-webui ADDRESS SUBJECT STYLE
                              times pictures of a running WebUI, with two of its LoRAs and without

What stands after the word is handed on: `python3 run.py demo -o pictures`, `python3 run.py test tests/gate`.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ROOMS_OF_THE_OLDEST = ("lora", "gate", "fusion", "discrepancy")
# Tests of one file share what is costly to make.
PARALLEL = ["--numprocesses=auto", "--maxprocesses=4", "--dist=loadfile"]
# What to install, and the modules to run with their arguments; the last one gets what the user adds.
COMMANDS = {
    "demo": (["-c", "constraints.txt", "-e", ".[demo]"], [["est_lora", "demo"]]),
    "test": (
        ["-c", "constraints.txt", "-e", ".[dev]"],
        [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], ["pytest", *PARALLEL]],
    ),
    "lab": (["-c", "constraints.txt", "-e", ".[dev]"], [["est_lora", "lab", "run"]]),
    "test-oldest": (
        [
            *("torch==2.1.2", "numpy==1.26.2", "safetensors==0.4.2", "pytest", "hypothesis", "filelock"),
            *("transformers==4.30.2", "huggingface_hub==0.16.4", "pillow==9.5.0"),
        ],
        [["pytest", *(f"tests/{room}" for room in ROOMS_OF_THE_OLDEST), "tests/test_clock.py", "tests/test_config.py"]],
    ),
    "benchmark": (["-c", "constraints.txt", "-e", ".[dev]"], [["benchmarks"]]),
    "benchmark-webui": (["-c", "constraints.txt", "-e", ".[dev]"], [["benchmarks.webui"]]),
}


def main(arguments: list[str]) -> int:
    """Runs one of the commands; returns its exit code."""
    if sys.version_info < (3, 10):
        print(f"This is Python {sys.version.split()[0]}; at least 3.10 is needed: start run.py with a newer one.")
        return 2
    if not arguments or arguments[0] not in COMMANDS:
        print(__doc__)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    command, *added = arguments
    packages, steps = COMMANDS[command]
    owner = next(name for name, (needed, _) in COMMANDS.items() if needed == packages)  # gigabytes need no twin
    python = environment(owner, packages)
    folder = None if command in {"demo", "lab"} else ROOT  # pictures go where the user is
    for step in [*steps[:-1], [*steps[-1], *added]]:
        if code := subprocess.run([python, "-m", *step], cwd=folder, check=False).returncode:
            return code
    return 0


def environment(command: str, packages: list[str]) -> str:
    """The Python of the virtual environment that has `packages`; made anew where it is missing or out of date."""
    folder = ROOT / f".venv-{command}"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    pins = [(ROOT / name).read_bytes() for name in ("constraints.txt", "pyproject.toml")]
    wanted = hashlib.sha256(b"".join([*pins, repr(packages).encode()])).hexdigest()
    installed = folder / "installed.txt"
    if not installed.is_file() or installed.read_text(encoding="utf-8") != wanted:
        print(f"Installing packages into {folder.name} (once; torch alone can be gigabytes) ...", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *packages], cwd=ROOT, check=True)
        installed.write_text(wanted, encoding="utf-8")
    return str(python)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except subprocess.CalledProcessError as error:
        sys.exit(f"The packages could not be installed (pip ended with {error.returncode}); its own words stand above.")
    except KeyboardInterrupt:
        sys.exit(130)
