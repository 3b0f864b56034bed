"""A page in Debian's Chromium, driven through its debugging pipe: nothing to install but the browser."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")


class Browser:
    """One page. errors: what its scripts threw, and what the browser itself complained about."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        commands_in, commands_out = os.pipe()
        replies_in, replies_out = os.pipe()
        # The browser reads commands from its descriptor 3 and writes replies to 4.
        pipes = f'exec 3<&{commands_in} 4>&{replies_out}; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", pipes, "bash", str(CHROMIUM), *_OPTIONS, f"--user-data-dir={self._profile.name}"],
            pass_fds=(commands_in, replies_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(commands_in)
        os.close(replies_out)
        self._commands, self._replies = os.fdopen(commands_out, "wb"), os.fdopen(replies_in, "rb")
        self._count, self._session, self._unread = 0, "", b""
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page", "Network"):
            self._send(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._commands.close()
        self._process.terminate()
        self._process.wait(timeout=30)
        self._replies.close()
        self._profile.cleanup()

    def open(self, page: Path, *, width: int, height: int = 900) -> None:
        """Load `page` in a window of `width` CSS pixels."""
        self._send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self._send("Page.navigate", url=page.resolve().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        reply = self._send("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in reply:
            raise AssertionError(f"{script}: {reply['exceptionDetails']}")
        return reply["result"].get("value")

    def screenshot(self, file: Path) -> None:
        """The whole page, not only what the window shows, as PNG."""
        reply = self._send("Page.captureScreenshot", captureBeyondViewport=True, **self._whole())
        file.write_bytes(base64.b64decode(reply["data"]))

    def _whole(self) -> dict[str, Any]:
        size = self._send("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {**size, "scale": 1}}

    def _send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while (reply := self._next()).get("id") != self._count:
            pass
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']}")
        return reply["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            piece = os.read(self._replies.fileno(), 1 << 20)
            if not piece:
                raise RuntimeError(f"{CHROMIUM} ended with {self._process.wait()}")
            self._unread += piece
        text, self._unread = self._unread.split(b"\0", 1)
        message = json.loads(text)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, parameters: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.errors.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
