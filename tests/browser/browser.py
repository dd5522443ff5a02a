"""A headless Chromium without a network, driven through its debugging pipe (Chrome DevTools Protocol): no package is needed, pages are opened as they are."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_OPTIONS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-gpu",
    "--disable-sync",
    "--hide-scrollbars",
    "--no-first-run",
)


@dataclass
class Visit:
    """What became of one page: the addresses it asked for besides its own file, what its console says, and what its pictures are."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    pictures: list[dict[str, Any]] = field(default_factory=list)


class Browser:
    """One browser with one page. Every wait ends after `seconds`."""

    def __init__(self, profile: Path, seconds: float = 60.0) -> None:
        program = next((found for name in NAMES if (found := shutil.which(name))), None)
        if program is None:
            pytest.skip("needs a Chromium: apt-get install --no-install-recommends chromium")
        self._deadline_seconds, self._count, self._text, self._events = seconds, 0, b"", list[dict[str, Any]]()
        # The browser reads commands from its descriptor 3 and answers on 4.
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        command = [program, *_OPTIONS, *sandbox, f"--user-data-dir={profile}", "about:blank"]
        script = f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command], pass_fds=theirs, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for fd in (theirs_in, theirs_out, *theirs):
            os.close(fd)
        self._in, self._out = ours_in, ours_out
        self._session: str | None = None
        page = next(target for target in self.call("Target.getTargets")["targetInfos"] if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._out)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        os.close(self._in)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Return the browser's answer to one command."""
        self._count += 1
        number = self._count
        session = {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps({"id": number, "method": method, "params": params, **session}).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return dict(message["result"])
            self._events.append(message)

    def value(self, expression: str) -> Any:
        """Return what a line of JavaScript gives in the page, promises awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def visit(self, page: Path, width: int = 1280) -> Visit:
        """Open a file and wait until it is loaded and every picture is decoded, or has failed to be."""
        self._events.clear()
        address = page.resolve().as_uri()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=address)
        while not any(event.get("method") == "Page.loadEventFired" for event in self._events):
            self._events.append(self._next())
        pictures = self.value(
            "Promise.all([...document.images].map(async image => ({name: image.alt, decoded: await image.decode().then(() => true, () => false), "
            "width: image.naturalWidth, height: image.naturalHeight, shown: image.getBoundingClientRect().width})))"
        )
        return Visit(requests=self._requests(address), complaints=self._complaints(), pictures=pictures)

    def screenshot(self, out: Path) -> Path:
        """Write the whole page as a PNG file."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]))
        return out

    def _requests(self, address: str) -> list[str]:
        asked = [event["params"]["request"]["url"] for event in self._events if event.get("method") == "Network.requestWillBeSent"]
        return [url for url in asked if url.partition("#")[0] != address and not url.startswith("data:")]

    def _complaints(self) -> list[str]:
        texts = []
        for event in self._events:
            params = event.get("params", {})
            match event.get("method"):
                case "Log.entryAdded":
                    texts.append(params["entry"]["text"])
                case "Runtime.consoleAPICalled":
                    texts.append(" ".join(str(argument.get("value")) for argument in params["args"]))
                case "Runtime.exceptionThrown":
                    texts.append(params["exceptionDetails"]["text"])
        return texts

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + self._deadline_seconds
        while b"\0" not in self._text:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser said nothing for {self._deadline_seconds} s"
            more = os.read(self._in, 1 << 20)
            assert more, "the browser has ended"
            self._text += more
        message, _, self._text = self._text.partition(b"\0")
        return dict(json.loads(message))
