"""A run of `est-lora generate`: which seeds, what the pictures carry, the contact sheet, and going on after a break."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from est_lora.cli import main
from est_lora.demo.model import BASE, STYLE_LORA, SUBJECT_LORA
from est_lora.hosts import pictures
from est_lora.hosts.diffusers_loading import SCHEDULERS, sampler_names, set_scheduler
from tests.checkpoints import write_checkpoint
from tests.files import write
from tests.pipelines import SIZE, fitting_lora, stable_diffusion

PROMPT = 'a "knight", (ink:1.2), <猫>\nsecond line'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    pipe = stable_diffusion()
    pipe.save_pretrained(folder / "model")
    write_checkpoint(pipe, folder / "tiny, v1.safetensors")
    for seed, role in enumerate(("subject", "style")):
        write(folder / f"{role}.safetensors", fitting_lora(pipe.unet, seed))
    return folder


@pytest.fixture
def generate(made, tmp_path, monkeypatch, capsys):
    """Runs the command in a copy of the model's folder; gives exit code, the names it prints, and standard error."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")

    def generate(*flags):
        request = {
            "--model": "model",
            "--subject": "subject.safetensors",
            "--style": "style.safetensors",
            "--prompt": PROMPT,
            "--steps": "2",
            "--size": str(SIZE),
            "--device": "cpu",
            "-o": "out",
        } | {str(flag): str(value) for flag, value in zip(flags[::2], flags[1::2])}
        code = main(["generate", *(text for pair in request.items() for text in pair)])
        out, err = capsys.readouterr()
        return code, [os.path.relpath(line, "out") for line in out.splitlines()], err

    return generate


def carried(path):
    with Image.open(path) as picture:
        return picture.info["parameters"]


def content():
    return {path.name: path.read_bytes() for path in Path("out").iterdir()}


# Seeds


@pytest.mark.parametrize(
    ("flags", "seeds"),
    [
        ((), [0]),
        (("--seed", 5), [5]),
        (("--seed", 5, "--count", 2), [5, 6]),
        (("--seeds", "3"), [3]),
        (("--seeds", "9,2-4, 3 ,1"), [9, 2, 3, 4, 1]),
        (("--seeds", "9223372036854775808"), [2**63]),
    ],
)
def test_seeds(generate, flags, seeds):
    code, names, _ = generate(*flags)
    assert code == 0
    drawn = [name for name in names if not name.endswith("sheet.png")]
    assert drawn == [f"{number:05d}-{seed}.png" for number, seed in enumerate(seeds)]


def test_a_list_draws_what_each_seed_draws(generate):
    generate("--seeds", "4,2")
    generate("--seed", 2, "-o", "out/other")
    assert np.array_equal(pixels("out/00001-2.png"), pixels("out/other/00000-2.png"))
    assert not np.array_equal(pixels("out/00001-2.png"), pixels("out/00000-4.png"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        *(
            (("--seeds", text), f"--seeds can't be '{text}'")
            for text in ("", "x", "1,,2", "3-1", "-1", "1.5", "1-2-3", "٣")
        ),
        (("--seeds", "9223372036854775809"), "up to 9223372036854775808"),
        (("--seeds", "9" * 5000), "--seeds can't be '999"),
        (("--seeds", "0-100000"), "is more than 100000 pictures"),
        (("--seeds", "0-99999,200000"), "is more than 100000 pictures"),
        (("--seeds", "1", "--seed", 1), "leave --seed and --count out"),
        (("--seeds", "1", "--count", 1), "leave --seed and --count out"),
        (("--prompt", "a\nNegative prompt: b"), "A line of the prompt begins with 'Negative prompt:'"),
        (("--prompt", "caf\udce9"), "The prompt isn't Unicode"),
    ],
)
def test_nonsense_costs_one_sentence(generate, flags, says):
    code, names, err = generate(*flags)
    assert (code, names) == (2, [])
    assert says in err
    assert err.count("\n") == 1, err
    assert not os.path.exists("out")


# Infotext


def test_a_picture_says_how_it_was_made(generate):
    save_file(load_file("style.safetensors"), "my: style, 2.safetensors")
    weights = {"--model": "tiny, v1.safetensors", "--config": "model", "--style": "my: style, 2.safetensors"}
    knobs = {"--guidance": "6.5", "--seed": 3, "--lean": "-0.25", "--dtype": "bfloat16", "--negative": "red, blue"}
    flags = {**weights, **knobs, "--scheduler": "dpm++2m-karras"}
    assert generate(*(text for pair in flags.items() for text in pair))[0] == 0
    checkpoint = hashlib.sha256(Path("tiny, v1.safetensors").read_bytes()).hexdigest()[:10]
    *prompt, negative, last = carried("out/00000-3.png").split("\n")
    assert "\n".join(prompt) == PROMPT
    assert negative == "Negative prompt: red, blue"
    found = re.fullmatch(r"(.*, EST-LoRA fingerprint: )[0-9a-f]{12}(, Lora hashes: .*)", last)
    assert found[1] == (
        "Steps: 2, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 3, Size: 32x32,"
        f' Model hash: {checkpoint}, Model: "tiny, v1", EST-LoRA subject: subject, EST-LoRA style: "my: style, 2",'
        " EST-LoRA beta: 0.5, EST-LoRA lean: -0.25, EST-LoRA dtype: bfloat16, EST-LoRA fingerprint: "
    )
    hashes = f"subject: {body_hash('subject.safetensors')}, my style 2: {body_hash('my: style, 2.safetensors')}"
    assert found[2].startswith(f', Lora hashes: "{hashes}", Version: est-lora ')


def test_of_a_folder_only_the_name_is_said(generate):
    assert generate()[0] == 0
    last = carried("out/00000-0.png").split("\n")[-1]
    assert "Sampler: DDIM, Schedule type: DDIM, CFG scale: 7, Seed: 0, Size: 32x32, Model: model, EST-LoRA" in last
    assert "hash:" not in last


def test_the_size_is_the_models_own_if_none_is_given(made, generate):
    code = main(["generate", "--model", str(BASE), *lora_flags(), "--prompt", "x", "--steps", "2", "-o", "own"])
    assert code == 0
    assert Image.open("own/00000-0.png").size == (64, 64)
    assert "Size: 64x64," in carried("own/00000-0.png")


def lora_flags():
    return ["--subject", str(SUBJECT_LORA), "--style", str(STYLE_LORA)]


def body_hash(path):
    """SHA-256 of the tensors' bytes in the order of the file, its first 12 hex digits."""
    with safe_open(path, "pt") as file:
        names = file.offset_keys()
    tensors = load_file(path)
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in names)).hexdigest()[:12]


def test_every_scheduler_has_its_samplers_name():
    told = {}
    for name in SCHEDULERS:
        pipe = stable_diffusion()
        set_scheduler(pipe, name)
        told[name] = sampler_names(pipe.scheduler)[0]
    assert told == {
        "ddim": "DDIM",
        "ddpm": "DDPMScheduler",
        "deis": "DEISMultistepScheduler",
        "dpm++2m": "DPM++ 2M",
        "dpm++2m-karras": "DPM++ 2M",
        "dpm++2m-sde": "DPM++ 2M SDE",
        "dpm++2s": "DPMSolverSinglestepScheduler",
        "euler": "Euler",
        "euler-a": "Euler a",
        "heun": "Heun",
        "kdpm2": "DPM2",
        "kdpm2-a": "DPM2 a",
        "lcm": "LCM",
        "pndm": "PLMS",
        "unipc": "UniPC",
    }


@pytest.mark.parametrize(
    ("scheduler", "names"),
    [
        (diffusers.EulerDiscreteScheduler(use_karras_sigmas=True), ("Euler", "Karras")),
        (diffusers.EulerDiscreteScheduler(use_exponential_sigmas=True), ("Euler", "Exponential")),
        (diffusers.EulerDiscreteScheduler(timestep_spacing="linspace"), ("Euler", "Uniform")),
        (diffusers.EulerDiscreteScheduler(timestep_spacing="trailing"), ("Euler", "SGM Uniform")),
        (diffusers.PNDMScheduler(skip_prk_steps=True), ("PLMS", "DDIM")),
        (
            diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=3),
            ("DPM++ 3M SDE", "Uniform"),
        ),
        (diffusers.DPMSolverMultistepScheduler(solver_order=3), ("DPMSolverMultistepScheduler", "Uniform")),
        (diffusers.FlowMatchEulerDiscreteScheduler(), ("FlowMatchEulerDiscreteScheduler", None)),
    ],
)
def test_a_models_own_scheduler_has_its_samplers_name(scheduler, names):
    assert sampler_names(scheduler) == names


# Contact sheets


def test_several_pictures_have_a_contact_sheet(generate):
    code, names, _ = generate("--seeds", "7,3,11")
    assert code == 0
    assert names == ["00000-7.png", "00001-3.png", "00002-11.png", "00000-00002-sheet.png"]
    sheet = pixels("out/00000-00002-sheet.png")
    boxes = [(6, 6), (6, 204), (220, 6)]  # top and left of each
    for (top, left), name in zip(boxes, names):
        drawn = np.asarray(Image.open(f"out/{name}").convert("RGB").resize((192, 192), Image.Resampling.NEAREST))
        assert np.array_equal(sheet[top : top + 192, left : left + 192], drawn)
        assert sheet[top + 192 : top + 208, left : left + 192].min() < 128  # a label
    assert sheet[220:, 204:].min() == 255


def test_one_picture_has_none(generate):
    assert generate()[1] == ["00000-0.png"]


def test_a_sheet_has_a_name_of_its_own(generate):
    generate("--count", 4)
    before = content()
    for seeds in ("0,3", "0,1,3", "3,0"):
        _, names, _ = generate("--seeds", seeds)
        assert generate("--seeds", seeds)[1] == names
        assert re.fullmatch(r"0000\d-0000\d-sheet-[0-9a-f]{8}\.png", names[-1])
    after = content()
    assert len(after) == len(before) + 3
    assert {name: after[name] for name in before} == before


def test_many_pictures_have_several_sheets(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_MOST_ON_A_SHEET", 2)
    paths = [pictures.save(Image.new("RGB", (40, 300), "red"), tmp_path, 2**63, "") for _ in range(5)]
    sheets = list(pictures.contact_sheets(paths))
    assert [sheet.name for sheet in sheets] == [f"0000{a}-0000{b}-sheet.png" for a, b in [(0, 1), (2, 3), (4, 4)]]


# Going on


def test_the_same_command_again_draws_only_what_is_missing(generate, monkeypatch):
    _, names, _ = generate("--count", 3)
    before = content()
    os.remove("out/00002-2.png")
    os.remove("out/00000-00002-sheet.png")
    drawn = counted(monkeypatch)
    code, again, err = generate("--count", 3)
    assert (code, again, len(drawn)) == (0, names, 1)
    assert content() == before
    assert err.count(" is there already.\n") == 2
    assert "est-lora: 'out/00000-0.png' is there already.\n" in err
    assert "00002-2.png' is there already" not in err


def counted(monkeypatch):
    drawn = []
    draws = diffusers.StableDiffusionPipeline.__call__

    def draw(self, **request):
        drawn.append(request)
        return draws(self, **request)

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "__call__", draw)
    return drawn


@pytest.mark.parametrize(
    "changed",
    [
        ("--prompt", "a star"),
        ("--negative", "red"),
        ("--steps", 3),
        ("--guidance", "7.0000001"),
        ("--seed", 1),
        ("--size", "32x40"),
        ("--scheduler", "euler"),
        ("--scheduler", "ddpm"),
        ("--dtype", "bfloat16"),
        ("--beta", "0.6"),
        ("--style-te", "0.5"),
        ("--model", "tiny, v1.safetensors", "--config", "model"),
    ],
)
def test_other_settings_are_drawn(generate, changed):
    generate()
    _, names, err = generate(*changed)
    assert names == [f"00001-{1 if changed[0] == '--seed' else 0}.png"]
    assert "already" not in err
    assert generate(*changed)[2].endswith("is there already.\n")


def test_schedulers_without_a_samplers_name_are_told_apart(generate):
    own = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", solver_order=3, solver_type="heun", steps_offset=1
    )
    own.save_pretrained("model/scheduler")
    index = Path("model/model_index.json")
    index.write_text(index.read_text(encoding="utf-8").replace("DDIMScheduler", type(own).__name__), encoding="utf-8")
    generate()
    assert generate("--scheduler", "dpm++2m")[1] == ["00001-0.png"]
    told = [re.search("Sampler: .*?,", carried(f"out/0000{number}-0.png"))[0] for number in (0, 1)]
    assert told == ["Sampler: DPMSolverMultistepScheduler,"] * 2


def edit_weights(path):
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path)


def edit_metadata(path):
    save_file(load_file(path), path, metadata={"lora_adapter_metadata": '{"unet.lora_alpha": 1}'})


def edit_config(path):
    text = Path(path).read_text(encoding="utf-8")
    assert '"beta_end": 0.012' in text
    Path(path).write_text(text.replace('"beta_end": 0.012', '"beta_end": 0.0121'), encoding="utf-8")


@pytest.mark.parametrize(
    ("edit", "path"),
    [
        (edit_weights, "subject.safetensors"),
        (edit_weights, "style.safetensors"),
        (edit_metadata, "style.safetensors"),
        (edit_weights, "model/unet/diffusion_pytorch_model.safetensors"),
        (edit_config, "model/scheduler/scheduler_config.json"),
    ],
)
def test_other_files_of_the_same_name_are_drawn(generate, edit, path):
    generate()
    edit(path)
    assert generate()[1] == ["00001-0.png"]


def test_settings_beside_a_lora_count(generate):
    folder = Path("peft")
    folder.mkdir()
    shutil.copy("subject.safetensors", folder / "adapter_model.safetensors")
    for alpha in (8, 32):
        (folder / "adapter_config.json").write_text(f'{{"r": 4, "lora_alpha": {alpha}}}')
        assert generate("--subject", folder / "adapter_model.safetensors")[0] == 0
    assert len(content()) == 2


def test_a_linked_part_of_the_model_counts(generate):
    shutil.move("model/unet", "unet-1")
    shutil.copytree("unet-1", "unet-2")
    edit_weights(Path("unet-2/diffusion_pytorch_model.safetensors"))
    os.symlink("..", "model/loop")
    for unet in ("unet-1", "unet-2"):
        Path("model/unet").unlink(missing_ok=True)
        os.symlink(Path(unet).resolve(), "model/unet")
        assert generate()[0] == 0
    assert len(content()) == 2


@pytest.mark.parametrize("taken", ["00000-5.png", "00000-6.png", "999999999-5.png"])
def test_no_picture_of_another_process_is_overwritten(tmp_path, monkeypatch, taken):
    numbered = pictures._numbered

    def listed(folder):
        there = list(numbered(folder))
        if not (folder / taken).exists():  # the other process writes after this one has looked
            (folder / taken).write_bytes(b"other")
        return iter(there)

    monkeypatch.setattr(pictures, "_numbered", listed)
    saved = [pictures.save(Image.new("RGB", (8, 8)), tmp_path, 5, "x") for _ in range(2)]
    assert (tmp_path / taken).read_bytes() == b"other"
    assert len({*saved, tmp_path / taken}) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({taken, *(path.name for path in saved)})


def test_a_damaged_or_foreign_picture_is_no_picture(generate):
    generate()
    whole = Path("out/00000-0.png").read_bytes()
    Path("out/00000-0.png").write_bytes(whole[:-100])
    Image.new("RGB", (8, 8)).save("out/00001-0.png")
    Path("out/00002-0.png").write_bytes(b"no picture")
    Path("out/00003-0.png").mkdir()
    assert generate()[1] == ["00004-0.png"]
    assert Path("out/00004-0.png").read_bytes() == whole


def test_nothing_is_left_of_a_picture_that_could_not_be_written(generate, monkeypatch):
    save = Image.Image.save

    def full(self, path, **options):
        save(self, path, **options)
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Image.Image, "save", full)
    code, names, err = generate()
    assert (code, names, os.listdir("out")) == (2, [], [])
    assert "No space left on device" in err


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(generate, tmp_path):
    request = ["--model", "model", "--subject", "subject.safetensors", "--style", "style.safetensors", "-o", "out"]
    request += ["--prompt", PROMPT, "--steps", "2", "--size", str(SIZE), "--device", "cpu", "--count", "5000"]
    # Started in the background, this test would hand down that interrupts are ignored.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    command = [sys.executable, "-m", "est_lora", "generate", *request]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, text=True, **heard
    ) as running:
        first = [running.stdout.readline().strip() for _ in range(2)]
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=120)
    assert running.returncode == 130
    assert err.endswith("est-lora: interrupted.\n")
    assert "Traceback" not in err
    finished = sorted(os.listdir("out"))
    assert finished[:2] == ["00000-0.png", "00001-1.png"] == [os.path.basename(path) for path in first]
    assert finished == [f"{number:05d}-{number}.png" for number in range(len(finished))]
    assert len(finished) - len(first) - len(out.splitlines()) in (0, 1)  # one may be written and not yet said
    for name in finished:
        pixels(f"out/{name}")
    before = content()
    code, names, err = generate("--count", len(finished) + 1)
    assert code == 0
    assert names[:-2] == finished
    assert err.count("is there already") == len(finished)
    after = content()
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))
