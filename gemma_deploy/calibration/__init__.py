"""Calibration: what a model's activations look like on real text. Imports no torch until something is measured."""

from gemma_deploy.calibration.pipeline import Outcome, Request, calibrate
from gemma_deploy.calibration.sources import SOURCES, Source
from gemma_deploy.calibration.store import Calibration, Range

__all__ = ["SOURCES", "Calibration", "Outcome", "Range", "Request", "Source", "calibrate"]
