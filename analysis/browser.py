"""A browser without a window is driven over its own protocol: open a page, wait until it rests, click, take a picture.

with Browser() as browser:
    browser.open("http://127.0.0.1:5000")
    browser.picture(Path("page.png"))
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image
from websockets.sync.client import connect

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_REST = 2.0  # seconds without a change of the page
_PATIENCE = 60.0
_COLOURS = 96


class Browser:
    """Browser is a headless Chromium with one page.

    Args:
        width: width of the page in pixels
        height: height of the page in pixels

    Raises:
        ValueError: there is no Chromium on this machine.
    """

    def __init__(self, width: int = 1500, height: int = 900) -> None:
        program = next((found for name in _PROGRAMS if (found := shutil.which(name))), None)
        if program is None:
            raise ValueError(f"pictures need a browser: install one of {', '.join(_PROGRAMS)}")
        self._folder = tempfile.mkdtemp()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--hide-scrollbars"]
        options += [f"--user-data-dir={self._folder}", f"--window-size={width},{height}", "about:blank"]
        self._process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._socket = connect(self._address(), max_size=None)
        self._number = 0

    def __enter__(self) -> Browser:
        self._call("Page.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def open(self, address: str, shows: str = "") -> None:
        """Opens a page, and waits until it shows a text and rests."""
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=address)
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline and not self.run(f"document.body.innerText.includes({json.dumps(shows)})"):
            time.sleep(0.25)
        self.rest()

    def run(self, script: str) -> Any:
        """Returns the value of a JavaScript expression on the page."""
        return self._call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def click(self, text: str, tag: str = "*") -> None:
        """Clicks the last, that is innermost, element whose text begins with `text`, and waits until the page rests.

        Raises:
            ValueError: the page shows no such element.
        """
        every = f"[...document.querySelectorAll({json.dumps(tag)})]"
        shown = f"{every}.filter(e => e.offsetParent && e.textContent.trim().startsWith({json.dumps(text)}))"
        place = f"(e => e && (r => [r.x + r.width / 2, r.y + r.height / 2])(e.getBoundingClientRect()))({shown}.pop())"
        found = self.run(place)
        if not found:
            raise ValueError(f"the page shows no {text!r}")
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=found[0], y=found[1], button="left", clickCount=1)
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
        self.rest()

    def rest(self) -> None:
        """Waits until the page has not changed for two seconds, at most a minute."""
        deadline, before, since = time.monotonic() + _PATIENCE, None, time.monotonic()
        while time.monotonic() < deadline:
            now = self.run("document.readyState + document.body.innerHTML.length + document.body.innerText.length")
            if now != before or self.run("document.body.innerText.length < 200"):
                before, since = now, time.monotonic()
            elif time.monotonic() - since > _REST:
                return
            time.sleep(0.25)

    def picture(self, file: Path) -> None:
        """Writes what the page shows as a PNG of few colours."""
        data = base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])
        image = Image.open(io.BytesIO(data)).convert("RGB")
        image.quantize(_COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)

    def _address(self) -> str:
        """Returns the address of the page's protocol, which the browser writes down when it is ready."""
        import urllib.request

        port, deadline = Path(self._folder) / "DevToolsActivePort", time.monotonic() + _PATIENCE
        while not port.is_file() or not port.read_text().strip():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise ValueError("the browser does not start")
            time.sleep(0.1)
        with urllib.request.urlopen(f"http://127.0.0.1:{port.read_text().split()[0]}/json") as answer:
            return next(page["webSocketDebuggerUrl"] for page in json.load(answer) if page["type"] == "page")

    def _call(self, method: str, **given: Any) -> Any:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": given}))
        while (answer := json.loads(self._socket.recv(timeout=_PATIENCE))).get("id") != self._number:
            pass
        if "error" in answer:
            raise ValueError(f"{method}: {answer['error']['message']}")
        return answer["result"]
