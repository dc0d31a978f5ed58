"""Build the wheel, install it into a fresh environment and let it do what a user does first, away from the checkout.

    python scripts/check_wheel.py [--torch-index URL] [--extras build]

Ends with the exit code of the first step that fails. Needs a package index, minutes and the disk of an installation.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXTRAS = "build"
STEPS = (
    ("--version",),
    ("compile", "hf_gemma_int8"),
    ("parity", "--backend", "onnxruntime"),
    ("verify", "workspace/gemma-demo-int8-128-256"),
    ("run", "workspace/gemma-demo-int8-128-256", "-p", "Return the", "-n", "8"),
)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-index", help="a further package index, for wheels of torch without CUDA")
    parser.add_argument("--extras", default=EXTRAS, help=f"of the wheel  [default: {EXTRAS}]")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gemma-deploy-wheel-") as folder:
        base = Path(folder)
        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(base), str(ROOT))
        (wheel,) = base.glob("*.whl")
        venv.create(base / "venv", with_pip=True)
        index = ["--extra-index-url", given.torch_index] if given.torch_index else []
        pip = [str(base / "venv/bin/python"), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), *index]
        run(*pip, f"{wheel}[{given.extras}]")
        (base / "empty").mkdir()
        for step in STEPS:
            run(str(base / "venv/bin/gemma-deploy"), *step, cwd=base / "empty")
    print(f"{wheel.name}: installed with [{given.extras}], it compiled, proved and ran the demo")
    return 0


def run(*command: str, cwd: Path | None = None) -> None:
    """A step, shown; its failure ends the program."""
    print("$", " ".join(command), flush=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    code = subprocess.run(command, cwd=cwd, env=environment).returncode
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    raise SystemExit(main())
