"""A real headless Chromium, driven by the DevTools protocol over its pipe; every request of a page is seen.

Whatever a page asks of the network goes to a proxy that only counts: a socket here that listens and never answers.
What the browser asks for itself goes nowhere: no one listens at its own proxy.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TIMEOUT_S = 30
SILENT_S = 4
ITS_OWN = b"CONNECT www.google.com:443 "
"""Chromium looks for its search engine, whatever the page is."""
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync",
    "--disable-extensions", "--disable-background-networking", "--disable-component-update", "--disable-default-apps",
    "--disable-features=OptimizationHints,MediaRouter,Translate", "--metrics-recording-only", "--remote-debugging-pipe",
]  # fmt: skip
# Chromium reads commands from descriptor 3 and answers on 4.
AT_3_AND_4 = """
import os, sys
reads, writes = os.dup(int(sys.argv[1])), os.dup(int(sys.argv[2]))
os.dup2(reads, 3), os.dup2(writes, 4)
os.set_inheritable(3, True), os.set_inheritable(4, True)  # dup2 leaves alone what is there already
os.execvp(sys.argv[3], sys.argv[3:])
"""


def find() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab. `said` has every console message, log entry and exception; `asked` the address of every request."""

    def __init__(self, program: str, folder: Path) -> None:
        self.proxy = socket.create_server(("127.0.0.1", 0), backlog=50)
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        flags = [*FLAGS, "--proxy-server=127.0.0.1:9", f"--user-data-dir={folder}"]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", AT_3_AND_4, str(theirs_in), str(theirs_out), program, *flags],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self._forget()
        proxy = f"http://127.0.0.1:{self.proxy.getsockname()[1]}"
        own = self.call("Target.createBrowserContext", proxyServer=proxy, proxyBypassList="<-loopback>")
        target = self.call("Target.createTarget", url="about:blank", **own)["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.call(f"{domain}.enable")

    def _forget(self) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.loaded = False

    def call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._from], [], [], TIMEOUT_S)[0], "the browser says nothing"
            more = os.read(self._from, 1 << 16)
            assert more, "the browser is gone"
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        method, about = message.get("method"), message.get("params", {})
        if method == "Runtime.consoleAPICalled":
            self.said.append(str([argument.get("value") for argument in about["args"]]))
        elif method == "Log.entryAdded":
            self.said.append(about["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.said.append(about["exceptionDetails"]["text"])
        elif method == "Network.requestWillBeSent":
            self.asked.append(about["request"]["url"])
        elif method == "Page.domContentEventFired":
            self.loaded = True
        return message

    def open(self, page: Path, width: int = 1200, dark: bool = False) -> None:
        mode, size = "dark" if dark else "light", {"width": width, "height": 800, "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", **size, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": mode}])
        self._forget()
        self.call("Page.navigate", url=page.as_uri())
        while not self.loaded:
            self._next()
        # Two frames later, whatever the page asks for by itself has been asked for.
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def accessible(self) -> list[tuple[str, str, str]]:
        """(role, name, description) of everything that a screen reader is told of."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        fields = ("role", "name", "description")
        return [
            tuple(node.get(field, {}).get("value", "") for field in fields) for node in nodes if not node["ignored"]
        ]

    def click(self, selector: str) -> None:
        """A real press of the mouse in the middle of an element."""
        box = self.evaluate(
            f"(e => {{ e.scrollIntoView({{block: 'center', inline: 'center'}}); const b = e.getBoundingClientRect();"
            f" return [b.x + b.width / 2, b.y + b.height / 2]; }})(document.querySelector({json.dumps(selector)}))"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if kind == "keyDown" and key == "Enter" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def connected(self, patience_s: float = 0) -> list[bytes]:
        """What pages said to the proxy since the last call; b"" of one that holds the line in silence. Who hangs up
        without a word, as Chromium does of itself, has asked for nothing."""
        end, heard = time.monotonic() + patience_s, list[bytes]()
        while select.select([self.proxy], [], [], 0 if heard else max(0, end - time.monotonic()))[0]:
            with self.proxy.accept()[0] as connection:
                speaks = bool(select.select([connection], [], [], SILENT_S)[0])
                said = connection.recv(99) if speaks else b""
            if (said or not speaks) and not said.startswith(ITS_OWN):
                heard.append(said)
        return heard

    def close(self) -> None:
        os.close(self._to)
        os.close(self._from)
        self._process.terminate()
        self._process.wait(10)
        self.proxy.close()
