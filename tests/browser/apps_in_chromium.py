"""Apps of ours as processes of their own, and a real Chromium that opens them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

SCREENSHOTS = Path(__file__).resolve().parent.parent.parent / "outputs" / "space_screenshots"
WAIT_SECONDS = 120  # not how long it takes, but when a busy machine is given up
CHROMIUM_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


@contextlib.contextmanager
def served(app: Path, folder: Path, **environment: str) -> Iterator[str]:
    """Where a Gradio app is served, by its own process; its log, in `folder`, must hold no traceback in the end."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    log = folder / "app.log"
    own = {"GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(folder / "gradio"), "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, app], env={**os.environ, **own, **environment}, stdout=output, stderr=output
        )
    url = f"http://127.0.0.1:{port}/"
    deadline = time.monotonic() + WAIT_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            break
        time.sleep(0.3)
    else:
        process.kill()
        pytest.fail(f"The app did not start:\n{log.read_text()}")
    yield url
    process.send_signal(signal.SIGINT)
    process.wait(timeout=30)
    assert "Traceback" not in log.read_text(), log.read_text()


class Browser:
    """Chromium on a page."""

    def __init__(self, profile, url):
        from selenium import webdriver
        from selenium.webdriver.chrome.options import Options
        from selenium.webdriver.chrome.service import Service

        options = Options()
        options.binary_location = "/usr/bin/chromium"
        for flag in [*CHROMIUM_FLAGS, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
        self.driver.set_script_timeout(WAIT_SECONDS)
        self.url = url

    def open(self, width=1280, dark=False):
        """The page afresh, on a screen of that width."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.resize(width, 900)
        self.driver.get(self.url)

    def resize(self, width, height):
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def until(self, condition, what):
        deadline = time.monotonic() + WAIT_SECONDS
        while not (found := condition()):
            assert time.monotonic() < deadline, f"{what} did not come in {WAIT_SECONDS} s:\n{self.text('body')}"
            time.sleep(0.05)
        return found

    def wait(self, selector):
        """The first element of that kind that can be seen."""
        return self.until(lambda: next((each for each in self.all(selector) if each.is_displayed()), None), selector)

    def text(self, selector):
        return self.all(selector)[0].text

    def screenshot(self, name, width):
        self.resize(width, self.run("return document.documentElement.scrollHeight"))
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(SCREENSHOTS / f"{name}.png"))
