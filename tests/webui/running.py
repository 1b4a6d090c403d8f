"""A WebUI to test in: one that runs already, or a folder with one to start."""

from __future__ import annotations

import base64
import io
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import requests
import webuiapi
from PIL import Image

from tests.webui.checkpoints import write_sd15, write_sdxl
from tests.webui.loras import write_lora

ROOT = Path(__file__).parents[2]
TITLE, PROBE = "EST-LoRA", "EST-LoRA probe"
_MARK = "estlora-test"
_PATIENCE_S, _PATIENCE_OF_RELOADS_S = 180, 60
_READY = "Startup time"


class Running:
    """A WebUI with our checkpoints and LoRAs in its folders; the names begin with `estlora-test`.

    Attributes:
        folder: where it is installed.
        has_probe: whether it has the tests' own extension, which looks into it from inside.
        settings: those of our page that have been set, by their keys.
    """

    def __init__(self, address: str, folder: Path, *, has_probe: bool) -> None:
        self.address = address.rstrip("/")
        self.folder = folder
        self.has_probe = has_probe
        self.api = webuiapi.WebUIApi(baseurl=f"{self.address}/sdapi/v1")
        self.api.session.headers["Connection"] = "close"  # after an error the host closes it without a word
        self.is_forge = (folder / "backend").is_dir() or (folder / "ldm_patched").is_dir()
        self.seconds = 0.0
        self.settings: dict[str, object] = {}
        self._family = ""
        self._found = self.api.get_options().get("sd_model_checkpoint")

    @property
    def loras(self) -> Path:
        """Where LoRAs are."""
        return self.folder / "models" / "Lora" / _MARK

    def checkpoint(self, family: str, seed: int = 0) -> Path:
        """The path of a checkpoint of ours; it is written where it isn't there yet."""
        # Forge doesn't load one whose name it has had since before the file was there: each run of the tests has its own.
        name = f"{_MARK}-{family}-{seed}-{os.getpid()}.safetensors"
        path = self.folder / "models" / "Stable-diffusion" / name
        if not path.is_file():
            write = write_sdxl if family == "sdxl" else write_sd15
            write(path, tiny=not self.is_forge, seed=seed)
            self.api.refresh_checkpoints()
        return path

    def use(self, family: str) -> None:
        """Has the host load our checkpoint of a family."""
        if family != self._family:
            name = self.checkpoint(family).stem
            for _ in range(2):  # Forge takes the first only for a note
                self.api.set_options({"sd_model_checkpoint": self._title(name)})
            self._family = family

    def _title(self, stem: str) -> str:
        return next(model["title"] for model in self.api.get_sd_models() if model["model_name"] == stem)

    def lora(self, name: str, **how: Any) -> str:
        """The name of a LoRA for the family in use; `how` is `write_lora`'s."""
        stem = f"{_MARK}-{self._family}-{name}"
        path = self.loras / f"{stem}.safetensors"
        if not path.is_file():
            self.loras.mkdir(parents=True, exist_ok=True)
            write_lora(path, self.checkpoint(self._family), sum(map(ord, name)), **how)
            self.post("refresh-loras", {})
        return stem

    def pictures(
        self, prompt: str = "a red cat", est: object = None, probe: dict[str, Any] | None = None, **payload: Any
    ) -> tuple[list[np.ndarray], dict[str, Any]]:
        """Has pictures made; returns them as integers, and the host's `info`.

        Args:
            prompt: what to draw.
            est: the arguments of our extension: one dict of knobs, or a list.
            probe: what the probe is to do.
            payload: of the API's request; `init_images` makes it img2img.
        """
        scripts = {}
        if est is not None:
            scripts[TITLE] = {"args": est if isinstance(est, list) else [est]}
        if probe is not None:
            scripts[PROBE] = {"args": [probe]}
        small = {"steps": 4, "width": 64, "height": 64, "seed": 1, "cfg_scale": 5, "sampler_name": "Euler"}
        body = {"prompt": prompt, **small, "alwayson_scripts": scripts, **payload}
        if body.get("enable_hr") and self.is_forge:
            body |= {"hr_additional_modules": ["Use same choices"], "hr_upscaler": "None"}
        route = "img2img" if "init_images" in body else "txt2img"
        start = time.perf_counter()
        result = self.api.post_and_get_api_result(f"{self.address}/sdapi/v1/{route}", body, use_async=False)
        self.seconds = time.perf_counter() - start
        return [np.asarray(image.convert("RGB")).astype(int) for image in result.images], result.info

    @staticmethod
    def decode(image: str) -> np.ndarray:
        """A picture of a plain answer of the API."""
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB")).astype(int)

    def picture(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """The one picture of a request."""
        return self.pictures(*args, **kwargs)[0][0]

    def seen(self, *args: Any, probe: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """What the probe saw while a picture was made."""
        _, info = self.pictures(*args, probe={"on": True, **probe}, **kwargs)
        found: dict[str, Any] = json.loads(info["extra_generation_params"]["probe"])
        return found

    def post(self, route: str, body: object) -> requests.Response:
        """A plain request to the API."""
        return requests.post(f"{self.address}/sdapi/v1/{route}", json=body, timeout=_PATIENCE_S)

    def get(self, route: str, **query: str) -> requests.Response:
        """A plain request to our own routes."""
        return requests.get(f"{self.address}/est-lora/v1/{route}", params=query, timeout=_PATIENCE_S)

    def tidy_up(self) -> None:
        """Takes our files out of the host's folders, and has it use the checkpoint again that it used before."""
        if self._found in {model["title"] for model in self.api.get_sd_models()}:
            self.api.set_options({"sd_model_checkpoint": self._found})
        shutil.rmtree(self.loras, ignore_errors=True)
        for path in (self.folder / "models" / "Stable-diffusion").glob(f"{_MARK}-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class Started:
    """A WebUI started from its folder, with our extension and the probe linked into it."""

    def __init__(self, folder: Path, python: str, arguments: Sequence[str], port: int, log: Path) -> None:
        self.folder = folder
        self.log = log
        self._command = [python, "launch.py", *arguments, "--api", "--port", str(port)]
        self._address = f"http://127.0.0.1:{port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._linked: set[Path] = set()
        self._links = {
            folder / "extensions" / "est-lora": ROOT,
            folder / "extensions" / f"{_MARK}-probe": Path(__file__).parent / "probe",
        }

    def start(self) -> Running:
        """Starts it and waits until it answers."""
        for link, target in self._links.items():
            if not link.exists():
                link.symlink_to(target, target_is_directory=True)
                self._linked.add(link)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # how sums are rounded depends on the number of threads
        with self.log.open("wb") as stream:
            self._process = subprocess.Popen(
                self._command, cwd=self.folder, stdout=stream, stderr=subprocess.STDOUT, env=environment
            )
        deadline = time.monotonic() + _PATIENCE_S
        while not self.starts():  # not as soon as a route answers: scripts are there later
            said = self.log.read_text(errors="replace")
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{shlex.join(self._command)} didn't get ready; its last words:\n{said[-3000:]}")
            time.sleep(0.5)
        return Running(self._address, self.folder, has_probe=True)

    def starts(self) -> int:
        """How often it said that it is ready, counting those after Reload UI."""
        return self.log.read_text(errors="replace").count(_READY)

    def wait_for_next(self, starts: int) -> None:
        """Waits until it has said oftener than `starts` times that it is ready."""
        deadline = time.monotonic() + _PATIENCE_OF_RELOADS_S
        while self.starts() == starts:
            assert time.monotonic() < deadline
            time.sleep(0.5)

    def stop(self) -> None:
        """Stops it, and takes the links out again."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        while self._linked:
            self._linked.pop().unlink()
