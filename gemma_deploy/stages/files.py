"""The files beside graphs and parameters: config, tokenizer, and what the back end's runtime reads."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from gemma_deploy import child
from gemma_deploy.checkpoint.index import INDEX_NAME
from gemma_deploy.errors import ExportError
from gemma_deploy.names import CONFIG, GENERATION_CONFIG
from gemma_deploy.params.naming import index_of
from gemma_deploy.text.files import TOKENIZER
from gemma_deploy.text.saving import write_tokenizer

if TYPE_CHECKING:
    from gemma_deploy.job import Job
    from gemma_deploy.params.layout import Place

log = logging.getLogger(__name__)
LAST_LINES = 6  # of what a converter said


def write_model_files(job: Job, out: Path, tensors: Mapping[str, Sequence[Place]] = MappingProxyType({})) -> list[str]:
    """config.json, generation_config.json, the back end's own and the tokenizer, as files of the artifact's own.

    Args:
        tensors: of each parameter file, by its path in the artifact, for an index of names that are not this program's.

    Returns:
        Their names.
    """
    config = job.config
    said = {**job.checkpoint.config_dict(), **job.backend.config_keys(job.spec, config)}
    (out / CONFIG).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
    }
    (out / GENERATION_CONFIG).write_text(json.dumps(generation, indent=2) + "\n")
    own = job.backend.files(job.spec, config)
    for name, content in own.items():
        if isinstance(content, Path):
            shutil.copyfile(content, out / name)
        else:
            (out / name).write_text(json.dumps(content, indent=2) + "\n")
    if job.code_form.naming == "compressed-tensors":
        index = index_of(tensors, job.code_form.naming)
        (out / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
        own = {**own, INDEX_NAME: index}
    written = write_tokenizer(job.checkpoint, out, link=False)
    return [CONFIG, GENERATION_CONFIG, *own, *written]


def convert_tokenizer(job: Job, out: Path) -> tuple[Sequence[str], int]:
    """Have the back end make its own files of the tokenizer that lies in `out`.

    Returns:
        Their names, and the peak RSS in bytes of the process that made them.

    Raises:
        ExportError: it could not.
    """
    converter = job.backend.converter
    if converter is None or not (out / TOKENIZER).exists():
        return (), 0
    done = child.run("-m", converter.module, str(out), capture_output=True, text=True)
    if done.returncode:
        raise ExportError(
            f"the tokenizer could not be converted for backend.type {job.spec.backend}",
            where=str(out / TOKENIZER),
            problems=done.stderr.strip().splitlines()[-LAST_LINES:],
            next_step="see that transformers loads it: AutoTokenizer.from_pretrained of the checkpoint",
        )
    said = json.loads(done.stdout.splitlines()[-1])
    for note in said["notes"]:
        log.warning("%s: %s", out / TOKENIZER, note)
    return converter.files, said["peak"]
