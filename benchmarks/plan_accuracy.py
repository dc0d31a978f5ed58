"""What `compile --dry-run` says against what the compile takes: peak memory of every stage, and bytes on disk.

usage: plan_accuracy.py RECIPE --checkpoint DIR [-s KEY=VALUE ...] [--out DIR] [--keep]

Plans the compile, runs it in a process of its own that notes its peak (VmHWM, reset when a stage begins) and what lies
on disk when a stage ends, and prints a line for each stage and a JSON line. Time is shown, not judged: other programs
on the machine decide that. Exit 1 where memory or disk of the whole compile is off by more than 20 % and 4 MiB (the
demo has 2).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

LIMIT = 0.2
MIB = 1 << 20
FLOOR = 4 * MIB
PAUSE = 0.1  # seconds between two looks at the disk


def used(folder: Path) -> int:
    """Bytes of all files in it; those that are gone meanwhile count for nothing."""
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(place, name)).st_blocks * 512
    return total


class Peaks:
    """A watcher that notes the peak of every stage, and the bytes on disk behind it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.measured: dict[str, dict[str, int]] = {}

    def started(self, stage: str) -> None:
        """Reset the peak, and look at the disk until the stage ends: scratch files come and go."""
        Path("/proc/self/clear_refs").write_text("5")
        self.disk, self.over = 0, threading.Event()
        self.looking = threading.Thread(target=self._look, daemon=True)
        self.looking.start()

    def _look(self) -> None:
        while True:
            self.disk = max(self.disk, used(self.folder))
            if self.over.wait(PAUSE):
                return

    def advanced(self, stage: str, done: float, total: float, unit: str) -> None:
        """Nothing to note."""

    def said(self, stage: str, what: str) -> None:
        """Nothing to note."""

    def ended(self, stage: str) -> None:
        """Note."""
        from gemma_deploy.machine import peak_rss_bytes

        self.over.set()
        self.looking.join()
        now = used(self.folder)
        self.measured[stage] = {"ram": peak_rss_bytes(), "disk": max(self.disk, now), "left": now}


def compile_and_measure(recipe: Any, out: Path, parity: bool) -> dict[str, dict[str, Any]]:
    """In a process of its own: stage -> peak RSS and bytes on disk after it, and seconds."""
    from gemma_deploy.compile import compile_recipe

    peaks = Peaks(out.parent)
    stages = []
    compile_recipe(recipe, out=out, parity=parity, watcher=peaks, on_stage=stages.append)
    found = {}
    for stage in stages:
        own = peaks.measured[stage.name]
        # A child's peak beside what this process held, as the clock counts it.
        ram = max(own["ram"], stage.peak_rss_bytes if stage.child_rss_bytes else 0)
        found[stage.name] = own | {"ram": ram, "seconds": stage.seconds}
    return found


def main() -> int:
    """Plan, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("-s", "--set", action="append", default=[], dest="overrides")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--no-parity", action="store_true")
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    from gemma_deploy.compile import plan_recipe
    from gemma_deploy.recipe import Recipe

    folder = Path(tempfile.mkdtemp(prefix="plan-accuracy-", dir=args.out))
    recipe = Recipe.load(args.recipe, args.overrides, checkpoint=args.checkpoint)
    out, parity = folder / "artifact", not args.no_parity
    try:
        plan = plan_recipe(recipe, out=out, parity=parity)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            measured = pool.apply(compile_and_measure, (recipe, out, parity))
    finally:
        if not args.keep:
            shutil.rmtree(folder)
    lines, before = [], 0
    for stage in plan.stages:
        took = measured[stage.name]
        wrote = max(0, took["disk"] - before) if stage.disk_bytes else 0
        before = took["left"]
        lines.append(
            (stage.name, stage.ram_bytes, took["ram"], stage.disk_bytes, wrote, stage.seconds, took["seconds"])
        )
    print("memory and disk in MiB, time in s:  plan  took  off")
    for name, ram, peak, disk, wrote, planned, took in lines:
        memory = f"{ram / MIB:8.0f}{peak / MIB:8.0f}{ram / peak - 1:+8.0%}"
        print(f"{name:<12} memory {memory}   disk {disk / MIB:8.1f}{wrote / MIB:8.1f}   time {planned:8.1f}{took:8.1f}")
    most = max(one["ram"] for one in measured.values())
    largest = max(one["disk"] for one in measured.values())
    off = {"ram": plan.peak_ram_bytes / most - 1, "disk": plan.disk_bytes / largest - 1}
    missed = {"ram": plan.peak_ram_bytes - most, "disk": plan.disk_bytes - largest}
    print(f"whole: memory {off['ram']:+.0%}, disk {off['disk']:+.0%} (limit {LIMIT:.0%})")
    print("RESULT " + json.dumps({"recipe": args.recipe, "off": off, "stages": lines}))
    return int(any(abs(off[what]) > LIMIT and abs(missed[what]) > FLOOR for what in off))


if __name__ == "__main__":
    sys.exit(main())
