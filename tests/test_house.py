"""The house keeps its shape: which room may import which, how long a module may get, what the README says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from est_lora.config import FIELDS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "est_lora"
BELOW_HOSTS = {
    "errors": set(),
    "command": {"errors"},
    "config": {"errors"},
    "clock": set(),
    "lora": {"errors"},
    "gate": {"errors", "config", "lora"},
    "fusion": {"errors", "config", "lora", "gate"},
    "stored": {"errors"},
    "text": {"errors", "config", "stored"},
    "discrepancy": {"errors", "config", "stored"},
    "report": {"gate", "lora"},
    "plot": {"gate"},
}
ABOVE = {
    "hosts": BELOW_HOSTS.keys(),
    "demo": BELOW_HOSTS.keys() | {"hosts"},
    "lab": BELOW_HOSTS.keys() | {"hosts", "demo"},
    "cli": BELOW_HOSTS.keys() | {"hosts", "demo", "lab"},
    "__main__": {"cli"},
}
OUTSIDE = {"torch", "safetensors"}
INSIDE_FUNCTIONS = {"filelock", "huggingface_hub", "PIL", "psutil", "transformers"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE)
FOLDERS = ("benchmarks", "est_lora", "scripts", "tests")
SOURCES = sorted((*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))))


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """(module, whether at the top of the file) of every import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module, id(node) in top
        elif isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)


@pytest.mark.parametrize(
    "path", [p for p in MODULES if room(p) in BELOW_HOSTS], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_arrows_point_one_way(path):
    standard = __import__("sys").stdlib_module_names
    for module, at_top in imports(path):
        first, _, rest = module.partition(".")
        if first == "est_lora":
            assert rest.partition(".")[0] in BELOW_HOSTS[room(path)] | {room(path)}, module
        elif first not in standard:
            plots = first == "matplotlib" and room(path) == "plot"
            assert first in OUTSIDE or plots or (first in INSIDE_FUNCTIONS and not at_top), module


@pytest.mark.parametrize("path", [p for p in MODULES if room(p) in ABOVE], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nor_does_a_room_above_look_up(path):
    ours = [module.split(".")[1] for module, _ in imports(path) if module.startswith("est_lora.")]
    assert set(ours) <= ABOVE[room(path)] | {room(path)}


def test_every_room_is_known():
    assert {room(path) for path in MODULES} == BELOW_HOSTS.keys() | ABOVE.keys()


def test_importing_below_hosts_brings_no_heavy_package():
    import subprocess
    import sys

    code = (
        "import sys; import est_lora.fusion, est_lora.report, est_lora.plot, est_lora.clock, est_lora.discrepancy;"
        "heavy = {'matplotlib', 'diffusers', 'transformers', 'huggingface_hub', 'gradio', 'modules', 'PIL'};"
        "heavy &= set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_fits_in_a_head(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 600


def test_the_readmes_options_are_the_fields():
    options = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Options")[2]
    rows = [line for line in options.splitlines() if line.startswith("| `")]
    expected = [f"| `{f.key}` | {f.default} | {f.range} | {f.help} |".replace("*", r"\*") for f in FIELDS]
    assert rows[: len(expected)] == expected
