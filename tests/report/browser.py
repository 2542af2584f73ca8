"""Headless Chromium: what a page is after its scripts have run, and pictures of it.

As a script: python tests/report/browser.py PAGE FOLDER   writes report-light.png, report-dark.png, report-phone.png.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # there is no network
)  # fmt: skip


def browser() -> str | None:
    """The Chromium of this machine: CHROMIUM names one, else a known name on the path."""
    named = os.environ.get("CHROMIUM", "")
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


def call(page: Path, *arguments: str, milliseconds: int = 20_000, timeout: float = 120) -> str:
    """Open a page; returns standard output."""
    chromium = browser()
    assert chromium is not None
    with tempfile.TemporaryDirectory() as profile:
        command = [
            chromium, *OPTIONS, f"--user-data-dir={profile}", f"--virtual-time-budget={milliseconds}", *arguments,
            page.resolve().as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def dom(page: Path, *arguments: str) -> str:
    """The document after its scripts have run."""
    return call(page, "--dump-dom", *arguments)


def picture(page: Path, target: Path, width: int, height: int, *, dark: bool = False) -> None:
    """A screenshot."""
    look = ("--force-dark-mode", "--blink-settings=preferredColorScheme=0") if dark else ()
    call(page, f"--window-size={width},{height}", f"--screenshot={target.resolve()}", *look)


def main() -> None:
    """The README's pictures."""
    page, folder = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    picture(page, folder / "report-light.png", 1100, 1500)
    picture(page, folder / "report-dark.png", 1100, 1500, dark=True)
    picture(page, folder / "report-phone.png", 500, 1500)
    for name in ("light", "dark", "phone"):
        with Image.open(folder / f"report-{name}.png") as image:
            small = image.convert("RGB").quantize(64)
        small.save(folder / f"report-{name}.png", optimize=True)


if __name__ == "__main__":
    main()
