"""The picture of a report in docs/: the bundled ResNet-20 quantized, the page of its report photographed.

Drives a headless Chromium (Debian: apt-get install chromium) through its debugging pipe, as the tests do.

    python benchmarks/screenshot.py            # writes docs/report.png
    python benchmarks/screenshot.py --width 390 --dark --out build/phone.png
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 30  # to wait for an answer


def chromium() -> str | None:
    """Where a Chromium is, if there is one."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """A headless Chromium with one page; `problems` collects what its console says and what it tried to load."""

    def __init__(self) -> None:
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (to_read, self.commands), (self.answers, to_write) = os.pipe(), os.pipe()
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe"
        )
        command = [chromium() or "chromium", *flags.split(), f"--user-data-dir={self.profile.name}", "about:blank"]
        shell = f'exec "$@" 3<&{to_read} 4>&{to_write}'  # it wants these two numbers
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command], pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self.buffer, self.last, self.session, self.problems = b"", 0, None, []
        self.loaded = False
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(each["targetId"] for each in targets if each["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        os.close(self.commands)
        self.process.terminate()
        self.process.wait(SECONDS)
        os.close(self.answers)
        self.profile.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol, and wait for its result."""
        self.last += 1
        message = {"id": self.last, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self.last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self.buffer:
            if not select.select([self.answers], [], [], max(end - time.monotonic(), 0))[0]:
                raise TimeoutError("Chromium does not answer")
            read = os.read(self.answers, 1 << 20)
            if not read:
                raise RuntimeError("Chromium has ended")
            self.buffer += read
        line, _, self.buffer = self.buffer.partition(b"\0")
        answer = json.loads(line)
        self._notice(answer.get("method", ""), answer.get("params", {}))
        return answer

    def _notice(self, event: str, params: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self.loaded = True
        if event in (
            "Runtime.exceptionThrown",
            "Runtime.consoleAPICalled",
            "Log.entryAdded",
            "Page.javascriptDialogOpening",
        ):
            self.problems.append(f"{event}: {json.dumps(params)[:500]}")
        if event == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("file:", "data:")):
            self.problems.append(f"loads {params['request']['url']}")

    def open(self, path: Path, width: int = 1100, *, dark: bool = False, scripts: bool = True) -> None:
        """Show a file in a window of so many pixels, as people with a light or dark screen see it."""
        mobile, scheme = width < 600, {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=mobile)
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self.loaded:
            self._receive()

    def run(self, code: str) -> Any:
        """Evaluate JavaScript in the page, and give its value."""
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """Press Tab, Enter or Space as a person does."""
        codes = {"Tab": (9, ""), "Enter": (13, "\r"), "Space": (32, " ")}
        code, text = codes[key]
        common = {"key": text if key == "Space" else key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def click(self, selector: str) -> None:
        """Click on what a selector finds, with the mouse."""
        place = (
            "(e => { e.scrollIntoView({block: 'center'}); const box = e.getBoundingClientRect();"
            " return [box.x + Math.min(box.width / 2, 20), box.y + box.height / 2] })"
        )
        x, y = self.run(f"{place}(document.querySelector({json.dumps(selector)}))")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def photograph(self, path: Path, height: int | None = None, scale: float = 1.0) -> None:
        """Write the page as a PNG, whole or its top."""
        width, whole = self.run("[innerWidth, Math.ceil(document.documentElement.scrollHeight)]")
        clip = {"x": 0, "y": 0, "width": width, "height": min(height or whole, whole), "scale": scale}
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))


def main() -> None:
    """Quantize, compare, write the page and its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "report.png", help="%(default)s")
    parser.add_argument("--width", type=int, default=900, help="of the window in pixels; %(default)s")
    parser.add_argument("--height", type=int, default=1230, help="of the picture, at most; %(default)s")
    parser.add_argument("--scale", type=float, default=0.8, help="of the picture; %(default)s")
    parser.add_argument("--dark", action="store_true", help="as a dark screen has it")
    args = parser.parse_args()
    if chromium() is None:
        raise SystemExit("screenshot: there is no Chromium: apt-get install chromium")
    sys.path.insert(0, str(ROOT / "examples"))
    from fashion_mnist import load_model

    import ocs

    report = ocs.quantize(load_model(), wbits=4, r=0.05)
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        page = Path(folder) / "report.html"
        report.save(page)
        browser.open(page, args.width, dark=args.dark)
        browser.click("tbody:nth-of-type(5) td.name summary")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        browser.photograph(args.out, args.height, args.scale)
    print(f"written: {args.out}, {args.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
