"""Conversions, runs and quality of the peers and of ours, kept in one file that a killed run leaves whole."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peer_runtimes.environments import folder, python_of, source_of
from peer_runtimes.ours import NAME, compile_ours, run_ours
from peer_runtimes.processes import PeerError, Ran, exclusive, json_of, read_all, run
from peer_runtimes.variants import HERE, VARIANTS, Command, Place, Variant

log = logging.getLogger("peers")
Record = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What is measured, and where.

    Args:
        out: environments, one for all models; place: artifacts and results of this model.
        ours: an artifact, or None; recipe: what compiles it, or None; lock: held while something is timed.
        also: further artifacts of ours, by their names in the table; sizes: options of protocol.py, of every run.
    """

    checkpoint: Path
    out: Path
    place: Path
    threads: int
    lock: Path | None
    ours: Path | None
    recipe: Path | None
    also: dict[str, Path] = field(default_factory=dict)
    sizes: Command = field(default_factory=list)

    @property
    def ids(self) -> Path:
        """Token ids of the text."""
        return self.place / "ids.json"

    def environ(self) -> dict[str, str]:
        """Threads, for whoever reads it there."""
        return {"OMP_NUM_THREADS": str(self.threads)}

    def artifact(self, name: str) -> Path:
        """A variant's directory; ours is where it was said to be."""
        given = self.ours if name == NAME else self.also.get(name)
        return given or self.place / name.replace(" ", "-").lower()

    def opened(self, name: str) -> Path:
        """What a runner opens."""
        return self.artifact(name) / (VARIANTS[name].file if name in VARIANTS else "")

    def command(self, name: str, *options: object) -> Command:
        """A run of a variant or of ours."""
        words = [str(self.ids), "--threads", str(self.threads), *map(str, options)]
        if name == NAME or name in self.also:
            return run_ours(self.artifact(name), self.out, words)
        variant = VARIANTS[name]
        python = python_of(variant.environment, self.out)
        return [str(python), str(HERE / variant.runner), str(self.opened(name)), *words]

    def log(self, name: str, step: str) -> Path:
        """A file for what a process prints."""
        return self.place / f"{name.replace(' ', '-').lower()}.{step}.log"


class Results:
    """`results.json` of a model: conversions, runs and quality by variant."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.values: dict[str, Any] = {"conversions": {}, "runs": [], "quality": {}}
        if file.exists():
            self.values |= json.loads(file.read_text())

    def save(self) -> None:
        """Write all, in one step."""
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.values, indent=1))
        partial.replace(self.file)


def guarded(name: str, step: str, work: Callable[[], Record]) -> Record:
    """The record, or the problem in its place; what happened is logged."""
    try:
        record = work()
    except PeerError as error:
        record = {"problem": str(error)}
    shown = {key: value for key, value in record.items() if not isinstance(value, list)}
    log.info("%s, %s: %s", name, step, json.dumps(shown))
    return record


def convert(bench: Bench, name: str, variant: Variant | None = None) -> Record:
    """Convert once, the checkpoint in the page cache: seconds, peak RSS, bytes of the artifact.

    Args:
        variant: that of VARIANTS with this name unless given.
    """
    out = bench.artifact(name)
    scratch = bench.place / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    if name == NAME:
        if bench.recipe is None:
            raise PeerError("no recipe was given to compile it with")
        commands, prepare = [compile_ours(bench.recipe, bench.checkpoint, out)], []
    else:
        variant = variant or VARIANTS[name]
        python_of(variant.environment, bench.out)
        if out.exists():
            shutil.rmtree(out)
        source = source_of(variant.environment, bench.out)
        place = Place(folder(variant.environment, bench.out) / "bin", source, bench.checkpoint, scratch, out)
        commands, prepare = variant.convert(place), variant.prepare(place)
    try:
        for command in prepare:
            run(command, bench.log(name, "prepare"), bench.environ())
        with exclusive(bench.lock):
            read_all(bench.checkpoint)
            ran: list[Ran] = [run(command, bench.log(name, "convert"), bench.environ()) for command in commands]
    except PeerError:
        if name != NAME:
            shutil.rmtree(out, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {
        "seconds": sum(one.seconds for one in ran),
        "peak_rss_bytes": max(one.peak_rss_bytes for one in ran),
        "artifact_bytes": read_all(out),
    }


def rounds(bench: Bench, names: list[str], count: int, repeats: int, results: Results) -> None:
    """Run every variant once a round, ours before each, the lock held for the round; what failed is not run again."""
    results.values["runs"], failed = [], set()
    beside = [NAME] if bench.ours else []
    for number in range(count):
        with exclusive(bench.lock):
            for name in [one for one in names if one not in failed]:
                record: Record = {"round": number, "beside": name, "results": {}}
                for one in [one for one in (*beside, name) if one not in failed]:
                    found = guarded(one, f"round {number}", lambda n=one: speed(bench, n, repeats))
                    record["results"][one] = found
                    if "problem" in found:
                        failed.add(one)
                results.values["runs"].append(record)
                results.save()


def speed(bench: Bench, name: str, repeats: int) -> Record:
    """One process: load, first token, warm prefill and decode, peak RSS."""
    if not bench.opened(name).exists():
        raise PeerError("there is no artifact to run")
    command = bench.command(name, "--repeats", repeats, *bench.sizes)
    read_all(bench.artifact(name))
    return json_of(run(command, bench.log(name, "run"), bench.environ()))


def quality(bench: Bench, name: str, reference: Path) -> Record:
    """Perplexity, KL and top-1 against the reference's log-probabilities."""
    if not bench.opened(name).exists():
        raise PeerError("there is no artifact to run")
    command = bench.command(name, "--quality", reference)
    return json_of(run(command, bench.log(name, "quality"), bench.environ()))
