"""Training: seeded, and a run that was interrupted ends where one that wasn't does."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from est_lora.demo import train
from est_lora.lora import LoraFile

COMMANDS = {
    "base": ["base", "--pictures", "16", "--batch", "4"],
    "lora": ["lora", "subject", "--steps", "4", "--batch", "4"],
}


def run(command, output):
    train.main([*COMMANDS[command], "-o", str(output), "--workers", "0", "--save-every", "2"])
    return {path.name: load_file(path) for path in ([output] if output.is_file() else output.rglob("*.safetensors"))}


def same(one, other):
    return all(
        torch.equal(tensor, other[file][key]) for file, tensors in one.items() for key, tensor in tensors.items()
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch, command):
    whole = run(command, tmp_path / "whole" / "result.safetensors")
    loss, calls = train.denoising_loss, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "denoising_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(command, tmp_path / "parts" / "result.safetensors")
    halfway = {path.name: load_file(path) for path in (tmp_path / "parts").rglob("*.safetensors") if path.is_file()}
    resumed = run(command, tmp_path / "parts" / "result.safetensors")
    assert whole.keys() == resumed.keys() == halfway.keys()
    assert same(whole, resumed)
    assert not same(whole, halfway)


def test_a_trained_lora_is_like_anybodys(tmp_path):
    run("lora", tmp_path / "a.safetensors")
    file = LoraFile.load(tmp_path / "a.safetensors")
    assert (file.convention, file.kinds, file.ranks) == ("kohya", {"lora": 56}, [8])
    assert {update.scale for update in file.updates.values()} == {0.5}


@pytest.mark.parametrize("what", train.LESSONS)
def test_a_lesson_says_its_word_of_what_is_new_only(what):
    trigger = train.LESSONS[what].split()[0]
    pixels, captions = train.lesson(what, seed=0, batch=32)[0]
    assert pixels.shape == (32, 3, 32, 32)
    assert sum(trigger in caption for caption in captions[:16]) > 10
    assert not any(trigger in caption for caption in captions[16:])
