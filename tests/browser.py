"""A headless Chromium spoken to over a pipe in its DevTools protocol: nothing but the standard library."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run",
          "--disable-quic", "--disable-gpu", "--disable-extensions", "--disable-default-apps")  # fmt: skip


def found() -> str | None:
    """The program, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One open page. events: all that the browser has said of it so far."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = os.fdopen(read, "rb"), write
        self._number, self._session, self._rest = 0, "", b""
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of one command; events that come before it are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        os.write(
            self._write, json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0"
        )
        while (told := self._next()).get("id") != self._number:
            self.events.append(told)
        if "error" in told:
            raise RuntimeError(f"{method}: {told['error']}")
        return told["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = self._read.read1(1 << 20)
            if not part:
                raise RuntimeError("the browser has gone")
            self._rest += part
        one, _, self._rest = self._rest.partition(b"\0")
        return json.loads(one)

    def open(self, url: str, width: int, height: int, *, touch: bool = False) -> None:
        """Load a page at a size in CSS pixels and wait until it is there."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if touch else 1,
                 mobile=touch)  # fmt: skip
        self.ask("Emulation.setTouchEmulationEnabled", enabled=touch)
        self.events.clear()
        self.ask("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression; a promise is waited for."""
        told = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise RuntimeError(told["exceptionDetails"])
        return told["result"].get("value")

    def picture(self, file: Path, *, whole: bool = False) -> None:
        """A screenshot as PNG: of the window, or of the whole page."""
        data = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        file.write_bytes(base64.b64decode(data))

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, and what was thrown."""
        self.value("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
        told = []
        for event in self.events:
            params = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                told.append(json.dumps(params["exceptionDetails"]))
            if event.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                told.append(json.dumps(params["args"]))
            if event.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                told.append(params["entry"]["text"])
        return told

    def requests(self) -> list[str]:
        """Addresses asked for since the page was opened, itself included, those inside the page not."""
        sent = [event["params"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent if not params["request"]["url"].startswith("data:")]


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A page of a browser of its own, with an empty profile."""
    program = found()
    assert program is not None
    to_it, from_us = os.pipe()
    to_us, from_it = os.pipe()

    def as_3_and_4() -> None:
        for handle, number in ((os.dup(to_it), 3), (os.dup(from_it), 4)):
            os.dup2(handle, number)

    command = [
        program,
        "--headless=new",
        "--no-sandbox",
        "--remote-debugging-pipe",
        f"--user-data-dir={profile}",
        *_QUIET,
    ]
    running = subprocess.Popen(
        command, preexec_fn=as_3_and_4, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_it)
    os.close(from_it)
    try:
        yield Page(to_us, from_us)
    finally:
        os.close(from_us)
        running.terminate()
        running.wait(30)
