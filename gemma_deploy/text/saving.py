"""A checkpoint's tokenizer as files of a directory: of an artifact, of a staged or of a divided model."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import CheckpointError
from gemma_deploy.text import gguf
from gemma_deploy.text.building import build
from gemma_deploy.text.files import SENTENCEPIECE, TOKENIZER
from gemma_deploy.text.tokenizer import files_of
from gemma_deploy.writing import whole_file, write_bytes

log = logging.getLogger(__name__)


def write_tokenizer(checkpoint: Checkpoint, out: Path, *, link: bool = True) -> list[str]:
    """Put the tokenizer's files into `out`; a warning is logged where the checkpoint has none.

    A vocabulary inside a GGUF file is written as the files that transformers makes of it, and one of SentencePiece
    alone gets a tokenizer.json beside it, which loads in a second instead of ten and without its library.

    Args:
        checkpoint: the model.
        out: a directory.
        link: as links where nothing of the name is there; else as copies in the place of what is there.

    Returns:
        The files, by their path in `out`.
    """
    files = checkpoint.tokenizer_files()
    for file in files:
        target = out / file.relative_to(checkpoint.tokenizer_dir())
        target.parent.mkdir(exist_ok=True)
        if not link:
            with whole_file(target) as partial:  # what is there may be of a run that was killed
                shutil.copyfile(file, partial)
        elif not target.exists():
            link_file(file, target)
    names = {file.name for file in files}
    made: dict[str, bytes] = {}
    try:
        if not files and checkpoint.format == "gguf" and gguf.has_vocabulary(checkpoint.path):
            made = gguf.tokenizer_files(checkpoint.path)
        elif SENTENCEPIECE in names and TOKENIZER not in names:
            made = {TOKENIZER: build(files_of(checkpoint)).backend.to_str(pretty=True).encode()}
    except CheckpointError as error:  # the weights are still good
        log.warning("%s: the tokenizer cannot be used: %s", checkpoint.path, error.what)
    for name, data in made.items():
        write_bytes(out / name, data)
    if not names and not (out / TOKENIZER).exists():
        log.warning("%s: no tokenizer; text cannot be tokenized with it", checkpoint.path)
    return [*(file.relative_to(checkpoint.tokenizer_dir()).as_posix() for file in files), *made]


def link_file(source: Path, target: Path) -> None:
    """A symbolic link, or a hard link or copy where the file system has none."""
    absolute = source.parent.resolve() / source.name
    for way in (os.symlink, os.link):
        try:
            way(absolute, target)
            return
        except (OSError, NotImplementedError):
            target.unlink(missing_ok=True)
    shutil.copyfile(absolute, target)
