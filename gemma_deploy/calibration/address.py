"""The Ray cluster that calibrates in the place of this machine. Imports neither ray nor torch."""

from __future__ import annotations

from gemma_deploy.cluster import Setting
from gemma_deploy.errors import CalibrationError

CLUSTER = Setting("workspace.cluster", "without workspace.cluster this machine does the work", CalibrationError)
