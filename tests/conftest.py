"""What all tests share."""

from __future__ import annotations

import os
import tempfile

import torch
from hypothesis import settings

# No test asks the network, or finds what this machine has fetched for others. The library reads this once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_CACHE"] = os.path.join(tempfile.gettempdir(), "est-lora-tests-fetch-nothing")
# The tensors of the tests are tiny: a second thread costs more than it brings, and sums stay reproducible.
torch.set_num_threads(1)
settings.register_profile("est-lora", deadline=None, derandomize=True)
settings.load_profile("est-lora")


def pytest_addoption(parser):
    group = parser.getgroup("webui", "the tests in a real WebUI (tests/webui)")
    group.addoption("--webui", metavar="ADDRESS|FOLDER", help="a WebUI that runs on this machine, or one to start")
    group.addoption("--webui-folder", metavar="FOLDER", help="with an address: where that WebUI is installed")
    group.addoption("--webui-python", metavar="PATH", help="with a folder: the Python to start it with")
    group.addoption("--webui-args", metavar="TEXT", default="", help="with a folder: what to start it with")
    group.addoption("--webui-shots", metavar="FOLDER", help="where screenshots of the page are to be put")
