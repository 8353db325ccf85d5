"""A headless Chromium for tests, driven over its debugging pipe: no driver, no port, no websocket.

The protocol is JSON messages, each ended by a zero byte, on file descriptors 3 and 4.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
OWN = ROOT / ".browser" / "chromium"
"""Put there by the Makefile."""
INSTALLED = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
SECONDS = 60.0
"""Bound on every wait."""


class BrowserError(RuntimeError):
    """The browser ended, did not answer in time, or a script in the page failed."""


def find_chromium() -> Path | None:
    if OWN.exists():
        return OWN
    found = [path for name in INSTALLED if (path := shutil.which(name))]
    return Path(found[0]) if found else None


def chromium_or_skip() -> Path:
    """That browser; without one the test is skipped, and fails under CI."""
    if (found := find_chromium()) is not None:
        return found
    how = "`make .browser/chromium` fetches one"
    if os.environ.get("CI") == "true":
        pytest.fail(f"no Chromium: {how} (needs node and npm)")
    pytest.skip(f"no Chromium ({how})")


class Page:
    """One open page. Coordinates are CSS pixels of the viewport."""

    def __init__(self, pipe: _Pipe, session: str) -> None:
        self._pipe, self._session = pipe, session
        self.errors = pipe.errors
        """Uncaught exceptions and refused loads that the page reported."""
        self.requests = pipe.requests
        """Every address that the page asked for."""

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._pipe.call(method, self._session, **parameters)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The JSON value of an expression; BrowserError if it throws."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise BrowserError(f"{script}: {json.dumps(answer['exceptionDetails'])[:500]}")
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> None:
        end = time.monotonic() + SECONDS
        while not self.run(condition):
            if time.monotonic() > end:
                raise BrowserError(f"not true after {SECONDS} s: {condition}")
            time.sleep(0.02)

    def move_to(self, selector: str) -> None:
        """Scroll the first match into view and put the mouse on it."""
        x, y = self.run(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)});"
            " node.scrollIntoView({block: 'center'}); const box = node.getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def write(self, selector: str, text: str) -> None:
        """Replace what an input field holds by typing ``text``."""
        self.run(f"(() => {{ const n = document.querySelector({json.dumps(selector)});"
                 " n.focus(); n.select(); })()")  # fmt: skip
        if text:
            self.call("Input.insertText", text=text)
        else:
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key="Delete",
                          windowsVirtualKeyCode=46)  # fmt: skip

    def choose(self, selector: str, value: str) -> None:
        """Pick an option of a select element, or set a checkbox ("true" or "")."""
        self.run(
            f"(() => {{ const n = document.querySelector({json.dumps(selector)});"
            f" if (n.type === 'checkbox') n.checked = Boolean({json.dumps(value)});"
            f" else n.value = {json.dumps(value)};"
            " n.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )

    def screenshot(self, path: Path) -> None:
        picture = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(picture))


@contextmanager
def chromium(
    executable: Path, profile: Path, width: int = 1280, height: int = 900
) -> Iterator[Page]:
    """A page in a browser of its own; ``profile`` is an empty folder for its files."""
    environment = dict(os.environ)
    if executable == OWN:
        environment["LD_LIBRARY_PATH"] = str(OWN.parent / "lib")
    options = [
        "--headless=shell", "--no-sandbox", "--no-zygote", "--disable-gpu", "--mute-audio",
        "--disable-dev-shm-usage", f"--user-data-dir={profile}", "--remote-debugging-pipe",
    ]  # fmt: skip
    to_browser, from_us = os.pipe()
    to_us, from_browser = os.pipe()
    # A shell puts the pipes where the browser looks for them: 3 to read, 4 to write.
    shell = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
    process = subprocess.Popen(
        ["bash", "-c", shell, "bash", str(executable), *options],
        pass_fds=(to_browser, from_browser),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    os.close(to_browser)
    os.close(from_browser)
    pipe = _Pipe(process, to_us, from_us)
    try:
        target = pipe.call("Target.createTarget", url="about:blank", width=width, height=height)
        attached = pipe.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = Page(pipe, attached["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)  # fmt: skip
        yield page
    finally:
        process.kill()
        process.wait(SECONDS)
        os.close(to_us)
        os.close(from_us)


class _Pipe:
    def __init__(self, process: subprocess.Popen[bytes], reading: int, writing: int) -> None:
        self._process, self._reading, self._writing = process, reading, writing
        self._buffer = b""
        self._last = 0
        self.errors: list[str] = []
        self.requests: list[str] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + SECONDS
        while True:
            answer = self._next(end, method)
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self._note(answer)

    def _next(self, end: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._reading], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise BrowserError(f"the browser did not answer {method} within {SECONDS} s")
            received = os.read(self._reading, 1 << 16)
            if not received:
                raise BrowserError(
                    f"the browser ended (status {self._process.poll()}) during {method}"
                )
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(event["params"]["exceptionDetails"])[:500])
        elif event.get("method") == "Log.entryAdded":
            self.errors.append(event["params"]["entry"]["text"])
        elif event.get("method") == "Network.requestWillBeSent":
            self.requests.append(event["params"]["request"]["url"])
