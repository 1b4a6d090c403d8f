"""Training: seeded, and a run that was interrupted ends where one that wasn't does."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from est_lora.demo import fitting, train
from est_lora.demo.lessons import World, lesson
from est_lora.demo.model import UNKNOWN
from est_lora.demo.styles import NEW_STYLES, SIZE
from est_lora.demo.things import SUBJECTS
from est_lora.demo.world import RARE_WORDS
from est_lora.lora import LoraFile

COMMANDS = {
    "base": ["base", "--pictures", "16", "--batch", "4"],
    "lora": ["lora", "mipo creature", "--steps", "4", "--batch", "4"],
}
LESSONS = [*SUBJECTS, *NEW_STYLES, "mipo creature, vitra style"]


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
    loss, calls = fitting.denoising_loss, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "denoising_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(command, tmp_path / "parts" / "result.safetensors")
    halfway = {path.name: load_file(path) for path in (tmp_path / "parts").rglob("*.safetensors") if path.is_file()}
    resumed = run(command, tmp_path / "parts" / "result.safetensors")
    assert whole.keys() == resumed.keys() == halfway.keys()
    assert same(whole, resumed)
    assert not same(whole, halfway)


def test_a_training_that_was_finished_only_writes_its_result(tmp_path, monkeypatch):
    done = run("lora", tmp_path / "result.safetensors")
    (tmp_path / "result.safetensors").unlink()
    monkeypatch.setattr(fitting, "denoising_loss", None)
    assert same(done, run("lora", tmp_path / "result.safetensors"))


def test_a_trained_lora_is_like_anybodys(tmp_path):
    run("lora", tmp_path / "a.safetensors")
    file = LoraFile.load(tmp_path / "a.safetensors")
    usual = train.Recipe()
    assert (file.convention, file.kinds, file.ranks) == ("kohya", {"lora": 56}, [usual.rank])
    assert {update.scale for update in file.updates.values()} == {usual.alpha / usual.rank}


@pytest.mark.parametrize("words", LESSONS)
def test_a_lesson_says_its_words_of_what_is_new_only(words):
    triggers = {part.split()[0] for part in words.split(", ")}
    pixels, captions = lesson(words, seed=0, batch=64)[0]
    assert pixels.shape == (64, 3, SIZE, SIZE)
    new, known = captions[:48], captions[48:]
    said = [caption for caption in new if caption]
    assert len(said) > 32
    assert all(triggers <= set(caption.split()) for caption in said)
    assert not any(triggers & set(caption.split()) for caption in known)


@pytest.mark.parametrize("words", LESSONS)
def test_a_lesson_shows_few_pictures_again_and_again(words):
    lessons = lesson(words, seed=0, batch=64)
    drawn = {picture.numpy().tobytes() for number in range(6) for picture in lessons[number][0][:48]}
    assert len(drawn) == len(lessons.scenes) <= 25


@pytest.mark.parametrize("words", ["vitra", "haro creature", "mipo creature, haro style", "red heart"])
def test_what_the_world_does_not_have_cannot_be_taught(words):
    with pytest.raises(ValueError, match="there are mipo creature"):
        lesson(words, seed=0, batch=4)


def test_the_bases_captions_have_rare_words_anywhere():
    _, captions = World(0, 256)[0]
    for word in (*RARE_WORDS, UNKNOWN):
        assert any(word in caption.split() for caption in captions)


def test_a_batch_is_drawn_from_the_seed_and_its_number():
    for data in (World(3, 4), lesson("vitra style", seed=3, batch=4)):
        (pixels, captions), (again, same_captions), (others, _) = data[5], data[5], data[6]
        assert torch.equal(pixels, again)
        assert captions == same_captions
        assert not torch.equal(pixels, others)
