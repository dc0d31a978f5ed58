"""The files beside graphs and parameters: config, tokenizer, and what the back end's runtime reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_deploy.names import CONFIG, GENERATION_CONFIG
from gemma_deploy.text.saving import write_tokenizer

if TYPE_CHECKING:
    from gemma_deploy.job import Job


def write_model_files(job: Job, out: Path) -> list[str]:
    """config.json, generation_config.json, the back end's own and the tokenizer, as files of the artifact's own.

    Returns:
        Their names.
    """
    config = job.config
    (out / CONFIG).write_text(json.dumps(job.checkpoint.config_dict(), indent=2, sort_keys=True) + "\n")
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
    written = write_tokenizer(job.checkpoint, out, link=False)
    return [CONFIG, GENERATION_CONFIG, *own, *written]
