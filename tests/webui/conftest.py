from __future__ import annotations

import shlex
import socket
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def started(request, tmp_path_factory):
    """A WebUI that can be stopped and started again, or None where one ran already."""
    where = request.config.getoption("--webui")
    if where is None:
        pytest.skip("there is no WebUI to test in: name one with --webui=ADDRESS or --webui=FOLDER")
    pytest.importorskip("webuiapi", reason="the client isn't installed: pip install webuiapi")
    if where.startswith(("http://", "https://")):
        yield None
        return
    from tests.webui.running import Started

    folder = Path(where).resolve()
    python = request.config.getoption("--webui-python") or _python_of(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = shlex.split(request.config.getoption("--webui-args"))
    webui = Started(folder, python, arguments, port, tmp_path_factory.mktemp("webui") / "log.txt")
    yield webui
    webui.stop()


@pytest.fixture(scope="session")
def webui(request, started):
    """The running WebUI."""
    from tests.webui.running import Running

    if started is not None:
        running = started.start()
    else:
        folder = request.config.getoption("--webui-folder")
        if folder is None:
            pytest.skip(
                "checkpoints and LoRAs have to be put into the WebUI's folder: name it with --webui-folder=FOLDER"
            )
        running = Running(request.config.getoption("--webui"), Path(folder), has_probe=False)
        running.has_probe = "est-lora probe" in running.api.get_scripts()["txt2img"]
    from tests.webui.settings import settings

    if running.api.get_cmd_flags().get("nowebui"):
        yield running
    else:
        with settings(running, beta="0.5"):  # what measures, says so
            yield running
    running.tidy_up()


@pytest.fixture(scope="session")
def browser():
    """A browser without a window."""
    pytest.importorskip("selenium", reason="the page is tested with selenium: pip install selenium")
    from tests.webui import browser

    if browser.CHROMIUM is None:
        pytest.skip("there is no Chromium to look at the page with")
    driver = browser.start()
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, webui):
    """The WebUI's page, just opened on txt2img; there must be no error in its console when the test ends."""
    from tests.webui.browser import Page

    page = Page(browser, webui.address)
    page.open()
    yield page
    assert not page.console_errors()


@pytest.fixture(params=["sd15", "sdxl"], scope="session")
def family(request, webui):
    webui.use(request.param)
    return request.param


@pytest.fixture
def sd15(webui):
    webui.use("sd15")


@pytest.fixture
def probed(webui):
    if not webui.has_probe:
        pytest.skip("this needs the probe inside the WebUI: link tests/webui/probe into its extensions")
    return webui


def _python_of(folder):
    for path in ("venv/bin/python", "venv/Scripts/python.exe"):
        if (folder / path).is_file():
            return str(folder / path)
    return sys.executable
