"""The page in a real Chromium, in front of a server that says what a test tells it to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.page.openai_server import OpenAIServer

ROOT = Path(__file__).parent.parent.parent.parent
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update"),
    *("--disable-background-networking", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1100,800"),
)


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as running:
        yield running


@pytest.fixture
def webui(server, tmp_path) -> Iterator[str]:
    """Address of `gemma-deploy webui` for the server, as a user starts it."""
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    command = [sys.executable, "-m", "gemma_deploy.cli", "webui", "--api-base-url", server.url, "--port", "0"]
    with open(tmp_path / "stderr", "w+") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=said, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("open http://127.0.0.1:"), (line, (tmp_path / "stderr").read_text())
            yield line.split()[1]
        finally:
            process.terminate()
            process.wait(20)
            said.seek(0)
            assert "Traceback" not in said.read()


@pytest.fixture(scope="session")
def _chromium(tmp_path_factory) -> Iterator[Any]:
    selenium = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    options = selenium.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = selenium.Chrome(options=options, service=Service(driver, env={**os.environ, "LANG": "en_US.UTF-8"}))
    yield running
    running.quit()


class Page:
    """The page as somebody in front of it uses it."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url
        driver.get(url)
        driver.execute_script("localStorage.clear(); sessionStorage.clear();")
        self.reload()

    def reload(self) -> None:
        """As by F5; over when the models are there."""
        self.driver.get(self.url)
        self.until(lambda: self.all("#model option"))

    def all(self, selector: str) -> list[Any]:
        """Elements."""
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        """The only one, seen or not."""
        (found,) = self.all(selector)
        return found

    def texts(self, selector: str) -> list[str]:
        """What is seen of each."""
        return [one.text for one in self.all(selector)]

    def script(self, code: str, *given: Any) -> Any:
        """What `return ...` gives."""
        return self.driver.execute_script(code, *given)

    def until(self, condition: Any, seconds: float = 20.0) -> Any:
        """What the condition gives as soon as it holds."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, (self.texts("article"), self.texts("#toast"), self.problems())
            time.sleep(0.03)
        return found

    def size(self, width: int, height: int, *, touch: bool = False) -> None:
        """Of the page."""
        given = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", given)

    def type(self, text: str, *keys: str, selector: str = "#input") -> None:
        """Text and keys into a field."""
        self.one(selector).send_keys(text, *keys)

    def ask(self, text: str, *, wait: bool = True) -> None:
        """Type (or paste, where there are lines), press Enter, and wait for the end of the reply."""
        if "\n" in text:
            code = "const i = document.getElementById('input'); i.value = arguments[0];"
            self.script(code + "i.dispatchEvent(new Event('input'))", text)
            text = ""
        self.type(text, "\ue007")
        self.until(lambda: not self.one("#input").get_property("value"))
        if wait:
            self.done()

    def choose(self, selector: str, value: str) -> None:
        """One of the options of a list."""
        self.one(f"{selector} option[value='{value}']").click()

    def speaks(self, languages: str) -> None:
        """What the browser's user reads, as in Accept-Language."""
        given = {"userAgent": self.script("return navigator.userAgent"), "acceptLanguage": languages}
        self.driver.execute_cdp_cmd("Emulation.setUserAgentOverride", given)

    def done(self) -> None:
        """Wait for the end of the reply."""
        self.until(lambda: not self.one("#stop").is_displayed())

    def click(self, selector: str, which: int = -1) -> None:
        """A click where the element is, though it be shown only under a mouse."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).move_to_element(self.all(selector)[which]).click().perform()

    def problems(self) -> list[str]:
        """What the browser complained about since the last time, but for answers that are errors."""
        return [
            one["message"] for one in self.driver.get_log("browser") if "Failed to load resource" not in one["message"]
        ]

    def shot(self, name: str) -> None:
        """A picture for people, where GEMMA_DEPLOY_SHOTS names a folder for them."""
        folder = os.environ.get("GEMMA_DEPLOY_SHOTS")
        if folder:
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))


@pytest.fixture
def page(_chromium, webui) -> Iterator[Page]:
    page = Page(_chromium, webui)
    page.problems()
    yield page
    page.speaks("en-US")
    assert page.problems() == []  # no fault of a script, nothing that the policy stopped
    _chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    _chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
