"""A calibration on disk: `workspace/calib/DATASET-FINGERPRINT/`, whole or not there, found again by its inputs.

    calibration.json      what it was made from, the largest values, the hash of each file
    samples.safetensors   input_ids [nsamples, seqlen] int32
    stats.safetensors     POINT.min and POINT.max [channels], POINT.absmax [1], float32 (see points.py)
    ranges.png            absmax per layer

Imports no torch, so that a second run is quick.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from gemma_deploy.calibration.points import input_point
from gemma_deploy.errors import CalibrationError
from gemma_deploy.reading import FileKind, exists, open_regular, read_object
from gemma_deploy.workdir import Maker, WorkDir
from gemma_deploy.writing import write_json

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
RECORD, SAMPLES, STATS, PICTURE = "calibration.json", "samples.safetensors", "stats.safetensors", "ranges.png"
FILES = (RECORD, SAMPLES, STATS, PICTURE)
FINGERPRINT_DIGITS = 12
RECORD_FILE = FileKind(
    error=CalibrationError,
    expected="the record of a calibration, as `gemma-deploy calibrate` writes it",
    next_step="run `gemma-deploy calibrate --force` again",
)
CALIBRATE = Maker("calibrate", CalibrationError, "make room there or allow writing, or use another --workspace")


@dataclass(frozen=True)
class Range:
    """Values one tensor took over all windows.

    Args:
        minimum, maximum: [channels] float32.
    """

    minimum: np.ndarray
    maximum: np.ndarray

    @property
    def channel_absmax(self) -> np.ndarray:
        """[channels]: largest magnitude of each."""
        magnitude: np.ndarray = np.maximum(np.abs(self.minimum), np.abs(self.maximum))
        return magnitude

    @property
    def absmax(self) -> float:
        """Largest magnitude of all."""
        return float(self.channel_absmax.max())


@dataclass(frozen=True)
class Calibration:
    """A finished calibration; make one with `gemma_deploy.calibration.calibrate`, or open one."""

    path: Path
    record: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Calibration:
        """Open a calibration's directory.

        Raises:
            CalibrationError: it is incomplete, damaged, or of another version.
        """
        path = Path(path)
        problem = damage(path)
        if problem:
            raise CalibrationError(
                f"this calibration cannot be used: {problem}",
                where=str(path),
                expected=f"{RECORD}, {SAMPLES}, {STATS} as `gemma-deploy calibrate` wrote them",
                next_step="run `gemma-deploy calibrate --force` again",
            )
        return cls(path, read_object(path / RECORD, RECORD_FILE))

    @cached_property
    def samples(self) -> np.ndarray:
        """[nsamples, seqlen] int32, one BOS at the front of each row."""
        samples: np.ndarray = load_file(self.path / SAMPLES)["input_ids"]
        return samples

    @cached_property
    def ranges(self) -> dict[str, Range]:
        """Every point and its range."""
        stats = load_file(self.path / STATS)
        points = [name.removesuffix(".min") for name in stats if name.endswith(".min")]
        return {point: Range(stats[f"{point}.min"], stats[f"{point}.max"]) for point in points}

    def input_range(self, linear: str) -> Range:
        """Range of a linear's input; `model.layers.3.self_attn.v_proj` shares its with q_proj."""
        return self.ranges[input_point(linear)]


def directory_for(workspace: Path, dataset: str, fingerprint: str) -> Path:
    """Where a calibration with these inputs lies."""
    return workspace / "calib" / f"{dataset}-{fingerprint[:FINGERPRINT_DIGITS]}"


def find(path: Path, fingerprint: str) -> Calibration | None:
    """The calibration at `path` when it was made from exactly these inputs and is whole."""
    if not exists(path):
        return None
    problem = damage(path)
    if problem:
        log.warning("%s: %s; it is made again", path, problem)
        return None
    found = Calibration.open(path)
    return found if found.record["fingerprint"] == fingerprint else None


def damage(path: Path) -> str | None:
    """Why the directory is no whole calibration of this version, or None."""
    try:
        record = read_object(path / RECORD, RECORD_FILE)
        if not isinstance(record["fingerprint"], str):
            return f"{RECORD} is damaged: fingerprint is no text"
        if record["format_version"] != FORMAT_VERSION:
            return f"{RECORD} is of format {record['format_version']}, this version reads {FORMAT_VERSION}"
        for name in (SAMPLES, STATS):
            if sha256_of(path / name) != record["files"][name]:
                return f"{name} is not the file that was written (its sha256 differs)"
    except CalibrationError as error:
        return f"{RECORD} {error.what}"
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read: {error.strerror or error}"
    except (ValueError, KeyError, TypeError) as error:
        return f"{RECORD} is damaged: {error!r}"
    return None


class CalibrationDir(WorkDir):
    """The directory of a calibration while it is made; `finished` when there is a whole one already.

    Args:
        out: where it lies; fingerprint: of its inputs.
        force: make it again.

    Raises:
        CalibrationError: something else lies there, or the disk refuses. BusyError: another process is making it.
    """

    def __init__(self, out: Path, fingerprint: str, *, force: bool = False) -> None:
        super().__init__(out, CALIBRATE)
        self.fingerprint, self.force = fingerprint, force

    def check(self) -> None:
        """Look for a whole one, and refuse to replace anything but a calibration."""
        if not os.path.lexists(self.out):
            return
        own = self.out.is_dir() and all(file.name in FILES for file in self.out.iterdir())
        if not own:
            raise CalibrationError(
                "holds something else than a calibration; it will not be touched",
                where=str(self.out),
                next_step="move it away, or use another --workspace",
            )
        whole = not self.force and damage(self.out) is None
        self.finished = whole and Calibration.open(self.out).record["fingerprint"] == self.fingerprint


def write(out: Path, record: dict[str, Any], samples: np.ndarray, *, ranges: Mapping[str, Range]) -> None:
    """Write samples, statistics and the record (last) into `out`."""
    save_file({"input_ids": np.ascontiguousarray(samples, np.int32)}, out / SAMPLES)
    stats: dict[str, np.ndarray] = {}
    for point, found in ranges.items():
        stats |= {f"{point}.min": found.minimum, f"{point}.max": found.maximum}
        stats[f"{point}.absmax"] = np.array([found.absmax], np.float32)
    save_file(stats, out / STATS)
    files = {name: sha256_of(out / name) for name in (SAMPLES, STATS)}
    points = {point: {"channels": len(found.minimum), "absmax": found.absmax} for point, found in ranges.items()}
    record = {"format_version": FORMAT_VERSION, **record, "points": points, "files": files}
    write_json(out / RECORD, record, sort_keys=False, ensure_ascii=False)


def sha256_of(path: Path) -> str:
    """sha256 of a file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
