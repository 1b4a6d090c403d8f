"""The command line: what it prints, and what it says when it can't."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from est_lora.cli import main
from est_lora.config import FIELDS, FusionConfig
from est_lora.lora import LoraFile
from est_lora.plot import COLOURS
from tests import reference
from tests.files import ATTENTION_LAYERS, CONV, FEED_FORWARD, random_lora, write


@pytest.fixture
def pair(tmp_path):
    subject = random_lora(1, (*ATTENTION_LAYERS[:-1], CONV), rank=8, alpha=4.0)
    style = random_lora(2, (*ATTENTION_LAYERS[1:], FEED_FORWARD), rank=6, size=0.2)
    subject[ATTENTION_LAYERS[3]].up.zero_()
    write(tmp_path / "subject.safetensors", subject)
    write(tmp_path / "style.safetensors", style, "peft")
    return subject, style


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command in the folder of the files; gives its exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_inspect_json_is_the_documented_object(pair, run, tmp_path):
    code, out, err = run("inspect", "subject.safetensors", "style.safetensors", "--json", "--beta", "0.4")
    assert (code, err) == (0, "")
    told = json.loads(out)
    subject = told["subject"]
    assert set(told) == {"subject", "style", "config", "beta_used", "balance", "layers", "only_subject", "only_style"}
    assert subject == {
        "path": "subject.safetensors",
        "sha256": LoraFile.load(tmp_path / "subject.safetensors").sha256,
        "convention": "kohya",
        "kinds": {"lora": len(ATTENTION_LAYERS)},
        "ranks": [8],
        "unet_layers": len(ATTENTION_LAYERS),
        "text_encoder_layers": 0,
        "unknown_keys": [],
    }
    assert told["style"]["convention"] == "peft"
    assert set(told["config"]) == {field.key for field in FIELDS}
    assert (told["config"]["beta"], told["config"]["lean"], told["beta_used"]) == (0.4, 0.0, 0.4)
    assert told["only_subject"] == [CONV, ATTENTION_LAYERS[0]]
    assert told["only_style"] == [FEED_FORWARD, ATTENTION_LAYERS[-1]]
    taus = [step / 50 for step in range(51)]
    expected = reference.decisions(*pair, {"beta": 0.4}, taus)
    assert len(told["layers"]) == len(expected) == len(ATTENTION_LAYERS) + 2
    for layer in told["layers"]:
        assert set(layer) == {"name", "gated", "energy_subject", "energy_style", "rho", "segments"}
        rho, acts = expected[layer["name"]]
        assert layer["rho"] == (None if rho is None else pytest.approx(rho, rel=1e-6))
        assert layer["gated"] == (".attn" in layer["name"])
        decided = [[who for start, who in layer["segments"] if start <= tau][-1] for tau in taus]
        assert decided == acts
        for role, lora in zip(("subject", "style"), pair):
            dense = lora[layer["name"]].dense if layer["name"] in lora else torch.zeros(1)
            assert layer[f"energy_{role}"] == pytest.approx(float((dense**2).sum()), rel=1e-6)
    assert told["layers"][4]["segments"] == [[0.0, "style"]]  # the subject's update there is zero


def test_auto_is_shown_as_asked_and_as_used(pair, run):
    told = json.loads(run("inspect", "subject.safetensors", "style.safetensors", "--json")[1])
    assert (told["config"]["beta"], told["beta_used"]) == ("auto", 0.5)


def test_balance_is_null_without_a_layer_to_balance(run, tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.safetensors", random_lora(1, (CONV, FEED_FORWARD)))
    told = json.loads(run("inspect", "a.safetensors", "b.safetensors", "--json")[1])
    assert told["balance"] is None
    assert [(layer["rho"], layer["segments"]) for layer in told["layers"]] == [(None, [[0.0, "both"]])] * 2
    told = json.loads(run("inspect", "a.safetensors", "b.safetensors", "--json", "--layers", "all")[1])
    assert told["balance"] == pytest.approx(1.0)


@pytest.fixture
def model_and_dora(pair, tmp_path):
    """A model on disk, and a DoRA for its attention: `subject.safetensors` decomposed."""
    generator = torch.Generator().manual_seed(3)
    weights, dora = {}, load_file(tmp_path / "subject.safetensors")
    for name, factors in pair[0].items():
        weights[f"{name}.weight"] = torch.randn(factors.dense.shape, generator=generator)
        stem = "lora_unet_" + name.replace(".", "_")
        dora[f"{stem}.dora_scale"] = weights[f"{name}.weight"].flatten(1).norm(dim=1)[:, None] * 1.1
    (tmp_path / "model" / "unet").mkdir(parents=True)
    save_file(weights, tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(dora, tmp_path / "dora.safetensors")
    return {name.removesuffix(".weight"): weight for name, weight in weights.items()}


def test_what_depends_on_the_model_is_listed_so(model_and_dora, run):
    code, out, err = run("inspect", "dora.safetensors", "style.safetensors", "--json")
    assert code == 0
    waiting = len(model_and_dora)
    assert err.count("\n") == 1
    assert f"{waiting} of {waiting + 2} layers depend on the model's own weights" in err
    told = json.loads(out)
    assert told["subject"]["kinds"] == {"dora": waiting}
    for layer in told["layers"]:
        if layer["name"] in told["only_style"]:
            assert layer["segments"] == [[0.0, "style"]]
            continue
        assert (layer["energy_subject"], layer["rho"]) == (None, None)
        alone = layer["name"] in told["only_subject"]
        assert layer["segments"] == [[0.0, "subject" if alone else "needs the model"]]
    code, out, err = run("inspect", "dora.safetensors", "style.safetensors", "--plot", "map.png")
    assert (code, err) == (0, "")
    assert "needs the model" in out
    assert f"{waiting} of {waiting + 2} layers depend on the model's own weights: give the model (--model)" in out
    assert Image.open("map.png").size[0] > 100


def test_a_model_decides_what_depends_on_it(model_and_dora, pair, run):
    code, out, err = run("inspect", "dora.safetensors", "style.safetensors", "--json", "--model", "model")
    assert (code, err) == (0, "")
    for layer in json.loads(out)["layers"]:
        if layer["name"] not in pair[0]:
            continue
        weight = model_and_dora[layer["name"]].double()
        changed = weight + pair[0][layer["name"]].dense.reshape(weight.shape)
        rows = (
            changed.flatten(1) / changed.flatten(1).norm(dim=1)[:, None] * weight.flatten(1).norm(dim=1)[:, None] * 1.1
        )
        assert layer["energy_subject"] == pytest.approx(float((rows - weight.flatten(1)).square().sum()), rel=1e-5)
        assert (layer["rho"] is None) == (layer["name"] not in pair[1])


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("nowhere.safetensors", "There is no file 'nowhere.safetensors'"),
        ("style.safetensors", "holds no weights of a UNet"),
        (".", "it has no unet/"),
        ("model.ckpt", "is a pickle"),
    ],
)
def test_a_model_that_is_none_costs_one_sentence(model_and_dora, run, tmp_path, place, says):
    torch.save({"state_dict": {}}, tmp_path / "model.ckpt")
    assert_refused(*run("inspect", "dora.safetensors", "style.safetensors", "--model", place), says)


def test_the_table_counts_what_is_gated_added_and_left_out(model_and_dora, run, tmp_path):
    norm = "lora_unet_mid_block_resnets_0_norm1"
    tensors = load_file(tmp_path / "style.safetensors") | {f"{norm}.w_norm": torch.ones(3), "odd": torch.ones(1)}
    save_file(tensors, tmp_path / "style.safetensors")
    gated = f"{len(ATTENTION_LAYERS)} gated (2 of them in one file alone, which acts there)"
    for flags, rest in (
        ((), "1 outside the gate and added (subject), 1 outside"),
        (("--other", "off"), "2 left out (other off"),
    ):
        _, out, _ = run("inspect", "dora.safetensors", "style.safetensors", "--model", "model", *flags)
        line = next(line for line in out.splitlines() if " layers: " in line)
        assert line.startswith(f"{len(ATTENTION_LAYERS) + 2} layers: {gated}, {rest}")
        assert line.endswith("1 of the style's left out (see its remarks)")
        assert "1 norm" in out
        assert "'odd'" in out


def test_every_knob_is_a_flag(pair, run):
    given = {"subject_weight": -0.5, "style_weight": 1.5, "beta": 0.3, "alpha": 2.0, "lean": -0.25, "balance": "l1"}
    given |= {"pattern": "s*", "clock": "step", "method": "k-lora", "layers": "all", "other": "off", "engine": "branch"}
    given |= {"subject_te": 0.0, "style_te": 0.5}
    assert given.keys() | {"subject", "style"} == {field.key for field in FIELDS if not field.webui}
    flags = [text for field in FIELDS if field.key in given for text in (field.flag, given[field.key])]
    code, out, _ = run("inspect", "subject.safetensors", "style.safetensors", "--json", *flags)
    assert code == 0
    config = json.loads(out)["config"]
    assert {key: config[key] for key in given} == given
    assert all(given[field.key] != field.default for field in FIELDS if field.key in given)


def test_the_table_says_what_will_happen(pair, run):
    code, out, _ = run("inspect", "subject.safetensors", "style.safetensors")
    assert code == 0
    assert "kohya" in out
    assert "rank 8" in out
    rows = [line for line in out.splitlines() if line.startswith(("down_blocks", "mid_block", "up_blocks"))]
    assert len(rows) == len(ATTENTION_LAYERS) + 2
    assert any("subject, style from" in row for row in rows)
    assert "gated layers begin with the subject" in out


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_gate_map_is_drawn(pair, run, tmp_path, ending):
    path = tmp_path / f"map.{ending}"
    assert run("inspect", "subject.safetensors", "style.safetensors", "--plot", path)[0] == 0
    assert path.stat().st_size > 5000
    if ending == "png":
        with Image.open(path) as picture:
            colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
        drawn = {tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)): acts for acts, colour in COLOURS.items()}
        seen = {acts for rgb, acts in drawn.items() if rgb in colours}
        assert seen - {"none"} == {"subject", "style"}  # its light grey is in the letters' edges too


def damaged(lora):
    lora[ATTENTION_LAYERS[2]].up[0, 0] = float("nan")
    return lora


def infinite(lora):
    lora[ATTENTION_LAYERS[2]].down[0, 0] = float("inf")
    return lora


def mismatched(lora):
    lora[ATTENTION_LAYERS[2]].up = torch.randn(24, 9)
    return lora


def text_encoder_only(path):
    stem = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    save_file({f"{stem}.lora_down.weight": torch.ones(2, 4), f"{stem}.lora_up.weight": torch.ones(4, 2)}, path)


def sdxl(path):
    write(path, random_lora(1, width=32, context=2048))


FLUX, SD3 = "lora_unet_double_blocks_3_img_attn_proj", "transformer.transformer_blocks.3.attn.to_q"
BAD_FILES = {
    "text": lambda path: path.write_text("no safetensors file at all"),
    "truncated": lambda path: path.write_bytes(write(path, random_lora(1)).read_bytes()[:-50]),
    "huge header": lambda path: path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}"),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"lora": [1, 2, 3]})),
    "torch pickle": lambda path: torch.save({"lora": torch.ones(2)}, path),
    "nan": lambda path: write(path, damaged(random_lora(1))),
    "inf": lambda path: write(path, infinite(random_lora(1))),
    "ranks": lambda path: write(path, mismatched(random_lora(1))),
    "no layer in common": lambda path: write(path, random_lora(1, ("down_blocks.0.attentions.0.proj_in",))),
    "text encoder only": text_encoder_only,
    "empty file": lambda path: path.write_bytes(b""),
    "no tensors": lambda path: save_file({}, path),
    "nothing known": lambda path: save_file({"transformer.x": torch.ones(2)}, path),
    "flux": lambda path: save_file({f"{FLUX}.lora_{side}.weight": torch.ones(2, 2) for side in ("down", "up")}, path),
    "sd3": lambda path: save_file({f"{SD3}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}, path),
    "folder": lambda path: path.mkdir(),
    "missing": lambda path: None,
    "another model": sdxl,
    "another width": lambda path: write(path, random_lora(1, width=32)),
}
SAYS = {
    "text": "isn't a whole safetensors file",
    "truncated": "isn't a whole safetensors file",
    "huge header": "isn't a whole safetensors file",
    "pickle": "is a pickle",
    "torch pickle": "is a pickle",
    "nan": "NaN or infinite",
    "inf": "NaN or infinite",
    "ranks": "different ranks, 4 and 9",
    "no layer in common": "no layer of the UNet in common",
    "text encoder only": "only a text-encoder part",
    "empty file": "is an empty file",
    "no tensors": "holds no tensors",
    "nothing known": "no tensor that is known from a LoRA",
    "flux": "a LoRA for Flux, which has no UNet",
    "sd3": "a LoRA for SD3, which has no UNet",
    "folder": "is a folder",
    "missing": "did you mean 'style.safetensors'",
    "another model": "for different models, SDXL and SD1.5",
    "another width": "32 x 32 in one and 24 x 24 in the other",
}


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.parametrize("command", ["inspect", "measure", "generate"])
def test_a_bad_file_costs_one_sentence(run, tmp_path, case, command):
    write(tmp_path / "style.safetensors", random_lora(2, context=768 if case == "another model" else 40))
    BAD_FILES[case](tmp_path / "stale.safetensors")
    before = listing(tmp_path)
    if command == "inspect":
        arguments = ["stale.safetensors", "style.safetensors", "--plot", "map.png"]
    elif command == "measure":
        arguments = ["stale.safetensors", "style.safetensors", "--model", "m", "-o", "both.png"]
    else:
        arguments = ["--subject", "stale.safetensors", "--style", "style.safetensors", "--prompt", "x", "--model", "m"]
    code, out, err = run(command, *arguments)
    assert_refused(code, out, err, SAYS[case])
    assert listing(tmp_path) == before


BAD_KNOBS = [
    (["--beta", "2.1"], "beta can't be '2.1': it is a number in 0 ... 2, or auto"),
    (["--beta", "-0.1"], "beta can't be '-0.1'"),
    (["--beta", "much"], "beta can't be 'much'"),
    (["--beta", "nan"], "beta can't be 'nan'"),
    (["--alpha", "0"], "alpha can't be '0': it is a number in > 0 ... 10"),
    (["--alpha", "inf"], "alpha can't be 'inf'"),
    (["--lean", "1e999"], "lean can't be '1e999'"),
    (["--lean", "-1.0001"], "lean can't be '-1.0001'"),
    (["--subject-weight", "3"], "subject_weight can't be '3'"),
    (["--style-weight", ""], "style_weight can't be ''"),
    (["--method", "mean"], "method can't be 'mean': it is one of est, k-lora, sum, subject, style"),
    (["--pattern", "S"], "pattern can't be 'S'"),
    (["--engine", "fast"], "engine can't be 'fast'"),
    (["--beta"], "expected one argument"),
    (["--bta", "1"], "unrecognized arguments"),
    (["--plot", "nowhere/map.png"], "can't be written to 'nowhere/map.png'"),
    (["--plot", "map.xyz"], "can't be written to 'map.xyz'"),
]


@pytest.mark.parametrize(("flags", "says"), BAD_KNOBS)
def test_a_bad_knob_costs_one_sentence(pair, run, tmp_path, flags, says):
    before = listing(tmp_path)
    assert_refused(*run("inspect", "subject.safetensors", "style.safetensors", *flags), says)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--steps", "0"], "--steps can't be '0'"),
        (["--steps", "ten"], "--steps can't be 'ten'"),
        (["--count", "-1"], "--count can't be '-1'"),
        (["--seed", "1.5"], "--seed can't be '1.5'"),
        (["--guidance", "x"], "--guidance can't be 'x'"),
        (["--size", "100"], "--size can't be '100'"),
        (["--size", "64x"], "--size can't be '64x'"),
        (["--device", "abacus"], "device 'abacus' can't be used"),
        (["--device", "privateuseone"], "device 'privateuseone' can't be used"),
        (["--device", "meta"], "device 'meta' can't be used"),
        (["--dtype", "float8"], "--dtype can't be 'float8'"),
        (["-o", "subject.safetensors"], "that is a file"),
        ([], "There is no "),
    ],
)
def test_a_bad_request_for_pictures_costs_one_sentence(pair, run, tmp_path, flags, says):
    files = ["--subject", "subject.safetensors", "--style", "style.safetensors"]
    before = listing(tmp_path)
    assert_refused(*run("generate", "--model", "no-model", *files, "--prompt", "x", *flags), says)
    assert listing(tmp_path) == before


def test_a_model_that_is_not_there_costs_one_sentence(pair, run):
    files = ["--subject", "subject.safetensors", "--style", "style.safetensors"]
    assert_refused(*run("generate", "--model", "nix", *files, "--prompt", "x"), "There is no 'nix'")


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("{", "isn't a JSON object"),
        ("[]", "isn't a JSON object"),
        ('{"_class_name": "FluxPipeline"}', "is a 'FluxPipeline'"),
        ('{"_class_name": "StableDiffusionPipeline"}', "can't be loaded"),
        (
            '{"_class_name": "StableDiffusionPipeline", "unet": ["os", "system"]}',
            "of 'os', which generate doesn't load",
        ),
        ('{"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "T5Model"]}', "only CLIP's"),
        ('{"_class_name": "StableDiffusionPipeline", "unet": [[], {}]}', "doesn't load"),
    ],
)
def test_a_folder_that_is_no_model_costs_one_sentence(pair, run, tmp_path, index, says):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text(index)
    files = ["--subject", "subject.safetensors", "--style", "style.safetensors"]
    assert_refused(*run("generate", "--model", "model", *files, "--prompt", "x"), says)


def test_the_command_itself_says_it_without_a_traceback(pair, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "est_lora", "inspect", "subject.safetensors", "sty.safetensors"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert_refused(done.returncode, done.stdout, done.stderr, "did you mean 'style.safetensors'")


def test_a_folder_that_cannot_be_written_to_costs_one_sentence(pair, run, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "map.png")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    code, out, err = run("inspect", "subject.safetensors", "style.safetensors", "--plot", "map.png")
    assert_refused(code, out, err, "No space left on device")


@pytest.mark.parametrize("name", ["a$_.safetensors", "\u732b.safetensors"])
def test_any_file_name_can_be_drawn(pair, run, tmp_path, name, recwarn):
    (tmp_path / "style.safetensors").rename(tmp_path / name)
    assert run("inspect", "subject.safetensors", name, "--plot", "map.png")[::2] == (0, "")
    assert not recwarn.list


def test_an_error_without_a_file_and_a_missing_package_cost_one_sentence(pair, run, monkeypatch):
    def broken(*_):
        raise OSError("libfast.so: cannot open shared object file")

    monkeypatch.setattr(FusionConfig, "pair", broken)
    assert_refused(*run("inspect", "subject.safetensors", "style.safetensors"), "libfast.so: cannot open")
    monkeypatch.setitem(sys.modules, "est_lora.hosts.measuring", None)
    assert_refused(*run("measure", "subject.safetensors", "style.safetensors", "--model", "m"), "aren't installed")
    monkeypatch.setitem(sys.modules, "est_lora.gate", None)
    assert_refused(*run("inspect", "subject.safetensors", "style.safetensors"), "packages that aren't installed")


def test_no_command_and_help(run):
    assert_refused(*run(), "required")
    for command in ("measure", "generate"):
        with pytest.raises(SystemExit) as stopped:
            run(command, "--help")
        assert stopped.value.code == 0


def test_ctrl_c_is_no_traceback(run, pair, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(FusionConfig, "pair", interrupted)
    code, out, err = run("inspect", "subject.safetensors", "style.safetensors")
    assert (code, out, err) == (130, "", "est-lora: interrupted.\n")


def assert_refused(code, out, err, says):
    assert code == 2
    assert out == ""
    assert says in err
    assert err.count("\n") == 1, err
    assert err.startswith("est-lora: ")
    assert "Traceback" not in err


def listing(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


def test_the_helper_files_are_what_they_say(tmp_path):
    """Guards the tests above: the good half of each pair is indeed good."""
    good = write(tmp_path / "good.safetensors", random_lora(2))
    assert len(load_file(good)) == 3 * len(ATTENTION_LAYERS)
    assert main(["inspect", str(good), str(good)]) == 0
