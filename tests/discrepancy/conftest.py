"""Extractors to open, to copy and to spoil, where there is no network and nothing may be unpickled."""

from __future__ import annotations

import pickle
import shutil
import socket

import pytest
import torch

from est_lora.discrepancy import NAMES
from tests.extractors import write_clip, write_dino


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The folder of each extractor and its model."""
    folder = tmp_path_factory.mktemp("extractors")
    writers = {"dino": write_dino, "clip": write_clip}
    return {name: (folder / name, writers[name](folder / name)) for name in NAMES}


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def folder(made, name, tmp_path):
    """A copy of an extractor's folder, to be spoiled."""
    return shutil.copytree(made[name][0], tmp_path / name)


@pytest.fixture
def dino(made, tmp_path):
    return shutil.copytree(made["dino"][0], tmp_path / "dino")


@pytest.fixture
def clip(made, tmp_path):
    return shutil.copytree(made["clip"][0], tmp_path / "clip")


@pytest.fixture
def no_network(monkeypatch):
    """Whoever asks for an address is told that there is no network."""
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


@pytest.fixture
def no_pickles(monkeypatch):
    """Unpickling ends the test."""

    def refuse(*args, **kwargs):
        pytest.fail("something is unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
