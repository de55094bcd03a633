"""A page in headless Chromium."""

import shutil
import subprocess
from pathlib import Path

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=3000"
)


def in_browser(text: str, size: str, folder: Path) -> str:
    """The page as Chromium has it after its scripts; fails if they complain."""
    (folder / "page.html").write_text(text)
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={folder / 'user'}", f"--window-size={size}", "--dump-dom"]
    done = subprocess.run([*command, (folder / "page.html").as_uri()], capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not said, said
    return done.stdout
