"""The artifact: its directory, manifest, ledger, checks and report. Imports no torch."""

from gemma_deploy.artifact.commit import ArtifactDir
from gemma_deploy.artifact.manifest import Artifact, newest_artifact, op_census
from gemma_deploy.artifact.report import write_report

__all__ = ["Artifact", "ArtifactDir", "newest_artifact", "op_census", "write_report"]
