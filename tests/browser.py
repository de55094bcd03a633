"""A page in headless Chromium."""

import shutil
import subprocess
from pathlib import Path

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=3000"
)
READABLE = """<script>{
const boxes = [...document.querySelectorAll("svg")].map(
  svg => [...svg.querySelectorAll("text")].map(text => text.getBoundingClientRect()));
const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
const on = box => box.height >= 14 && box.left >= 0 && box.right <= innerWidth;
const good = boxes.every(found => found.every((a, i) => on(a) && found.slice(i + 1).every(b => apart(a, b))));
document.title += `|${boxes.flat().length}|${good}|${document.documentElement.scrollWidth <= innerWidth}`;
}</script>"""
"""Words of pictures are large enough, on the page, none over another; and the page does not scroll sideways."""


def in_browser(text: str, size: str, folder: Path) -> str:
    """The page as Chromium has it after its scripts; fails if they complain."""
    (folder / "page.html").write_text(text)
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={folder / 'user'}", f"--window-size={size}", "--dump-dom"]
    done = subprocess.run([*command, (folder / "page.html").as_uri()], capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not said, said
    return done.stdout
