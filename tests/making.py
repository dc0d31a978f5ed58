"""Artifacts from graphs that were exported before: what `compile` does around the export, the gate left out."""

import shutil

from gemma_deploy.artifact.commit import ArtifactDir
from gemma_deploy.job import Job
from gemma_deploy.stages.files import write_model_files
from gemma_deploy.stages.keys import stage_keys
from gemma_deploy.stages.parameters import write_parameters
from gemma_deploy.stages.record import describe


def finish(recipe, graphs, out):
    """Write the artifact of a recipe for the static pair with the graphs in a folder."""
    job = Job.open(recipe, out)
    with ArtifactDir(out, key="test") as directory:
        table = write_parameters(job, job.checkpoint, directory.path)
        for graph in job.graph_files:
            shutil.copy(graphs / graph, directory.path)
        beside = write_model_files(job, directory.path)
        manifest = describe(
            job, directory.path, keys=stage_keys(job, None), dataset=None, table=table, rescaling=None, quantized=None
        )
        directory.commit(manifest, {*table.files, *job.graph_files, *beside})
    return out
