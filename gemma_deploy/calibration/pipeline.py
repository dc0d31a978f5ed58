"""Calibration from end to end: data sets -> windows -> streaming pass -> directory; or the result found again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gemma_deploy.calibration import picture, store
from gemma_deploy.calibration.address import CLUSTER
from gemma_deploy.calibration.chat import Chat
from gemma_deploy.calibration.datasets import Located, each, locate
from gemma_deploy.calibration.mix import EXAMPLE, NAME, NSAMPLES, PATH, Mix, read_mix, turn_order
from gemma_deploy.calibration.requirements import check_room
from gemma_deploy.calibration.sources.reading import Row, Turns
from gemma_deploy.calibration.store import Calibration, Range
from gemma_deploy.calibration.windows import JOINT, Cut, TokenWindows, cut_windows, load_tokenizer_and_chat, shuffled
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.checkpoint.checkpoint import TOKENIZER_FILE
from gemma_deploy.errors import CheckpointError, UsageError
from gemma_deploy.names import CONFIG
from gemma_deploy.progress import Tick
from gemma_deploy.provenance import code_of
from gemma_deploy.reading import read_bytes
from gemma_deploy.text import template_of

SEQLEN = "seqlen"
# What the parts of a request are called: by `calibrate`, and by the recipe of a compile.
OPTIONS = {NAME: "--dataset", PATH: "--path", NSAMPLES: "--nsamples", SEQLEN: "--seqlen"}
KEYS = {key: f"dataset.{key}" for key in OPTIONS}
CODE = ("gemma_deploy.calibration.pipeline",)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What to calibrate on.

    Args:
        dataset: a data set or a mix, `c4` or `c4:64,alpaca:64`; path: where it lies. Words as in calibration/mix.py.
        nsamples, seqlen: windows (of a mix: their sum), and tokens in each, BOS included.
        seed: order of the texts of each data set.
        embed_scale: "exact" or "bf16", how the model rounds its embedding scale.
    """

    dataset: str
    path: str | Path | None
    nsamples: int
    seqlen: int
    seed: int = 0
    embed_scale: str = "exact"

    @property
    def mix(self) -> Mix:
        """The data sets, and what is wrong with the words for them."""
        return read_mix(self.dataset, None if self.path is None else str(self.path), self.nsamples)

    @property
    def label(self) -> str:
        """The data sets' names, for file names and titles."""
        return "+".join(part.name for part in self.mix.parts)


@dataclass(frozen=True)
class Outcome:
    """A calibration, and whether it had been made before."""

    calibration: Calibration
    reused: bool


def calibrate(
    checkpoint: Checkpoint,
    request: Request,
    workspace: Path,
    *,
    force: bool = False,
    progress: Tick | None = None,
    processes: int = 1,
    cluster: str | None = None,
) -> Outcome:
    """Make or find the calibration of these inputs.

    Args:
        checkpoint: the model.
        request: what to calibrate on.
        workspace: the result goes to its calib/.
        force: make it again.
        progress: called with (windows passed through layers, all of them).
        processes, cluster: where windows pass through layers, see `open_executor`; the result is the same.

    Raises:
        UsageError: the request makes no sense: a data set that is not known, windows longer than the context, ...
        CalibrationError: a data set is damaged or too short, or the workspace cannot be written to.
        BusyError: another process is making the same calibration.
        CheckpointError: no usable tokenizer.
        PreflightError: too little memory or disk.
    """
    check(checkpoint, request)
    found = locate(request.mix.parts, request.nsamples)
    inputs = describe_inputs(checkpoint, request, found)
    fingerprint = fingerprint_of(inputs)
    out = store.directory_for(workspace, request.label, fingerprint)
    known = None if force else store.find(out, fingerprint)
    if known:
        return Outcome(known, True)
    if cluster is not None:
        CLUSTER.require(cluster)
    check_room(checkpoint.config, request.nsamples, request.seqlen, workspace=workspace, processes=processes)
    windows = make_windows(checkpoint, request, found)
    with store.CalibrationDir(out, fingerprint, force=force) as made:
        if made.finished:  # by another process just now
            return Outcome(Calibration.open(out), True)
        unfinished = made.path
        ranges = measure(
            checkpoint, windows, request, scratch=unfinished, progress=progress, processes=processes, cluster=cluster
        )
        title = f"{checkpoint.path.name} on {request.label}: {request.nsamples} windows of {request.seqlen} tokens"
        picture.draw(ranges, title, unfinished / store.PICTURE)
        record: dict[str, Any] = {"fingerprint": fingerprint, "inputs": inputs, "texts_used": windows.texts_used}
        record["places"] = {one.name: str(one.place) for one in found} | {"checkpoint": str(checkpoint.path)}
        store.write(unfinished, record, windows.ids, ranges=ranges)
        made.publish()
    return Outcome(Calibration.open(out), False)


def check(checkpoint: Checkpoint, request: Request, called: Mapping[str, str] = OPTIONS) -> None:
    """Refuse what can be refused before anything is read.

    Args:
        called: the words for the parts of the request, `OPTIONS` or `KEYS`.

    Raises:
        UsageError: with everything that is wrong with the request; CheckpointError: no BOS.
    """
    problems = [f"{called[key]}: {text}" for key, text in request.mix.problems]
    if request.nsamples < 1:
        problems.append(f"{called[NSAMPLES]}: {request.nsamples} windows, expected at least 1")
    if request.seqlen < 2:
        problems.append(
            f"{called[SEQLEN]}: windows of {request.seqlen} tokens, expected at least 2, the first of them BOS"
        )
    longest = checkpoint.config.max_position_embeddings
    if request.seqlen > longest:
        problems.append(
            f"{called[SEQLEN]}: windows of {request.seqlen} tokens are longer than the model's context, "
            f"expected at most {longest} (max_position_embeddings of {checkpoint.path})"
        )
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        help_with = (
            "`gemma-deploy calibrate --help` has examples" if called is OPTIONS else "docs/recipes.md has every key"
        )
        raise UsageError(
            f"this request makes no sense ({count})",
            problems=problems,
            expected=f"{called[NAME]} c4, or a mix such as {EXAMPLE}, of windows that the model can take",
            next_step=f"correct the lines above; {help_with}",
        )
    if checkpoint.config.bos_token_id is None:
        raise CheckpointError(
            "bos_token_id is null, but every Gemma sequence begins with BOS",
            where=str(checkpoint.path / CONFIG),
            next_step="set bos_token_id in config.json (2 in every Gemma)",
        )


def describe_dataset(checkpoint: Checkpoint, request: Request, found: Sequence[Located]) -> dict[str, Any]:
    """What decides every token of the windows, as JSON.

    Returns:
        `sources` (name, windows, file and its sha256 or the commit on the hub, how rows became text), `windows`
        (nsamples, seqlen in tokens, seed) and `tokenizer_sha256`.
    """
    talks = any(one.source.turns for one in found) and bool(template_of(checkpoint))
    sources = [{**one.identity, "rendered": "chat template" if talks and one.source.turns else "text"} for one in found]
    return {
        "sources": sources,
        "windows": {"nsamples": request.nsamples, "seqlen": request.seqlen, "seed": request.seed},
        "tokenizer_sha256": tokenizer_sha256(checkpoint),
    }


def dataset_record(checkpoint: Checkpoint, request: Request) -> dict[str, Any]:
    """`describe_dataset` and its hash, for the manifest of an artifact that was made by looking at these windows.

    Raises:
        UsageError: the request makes no sense; CalibrationError: a data set is not there.
    """
    check(checkpoint, request, KEYS)
    said = describe_dataset(checkpoint, request, locate(request.mix.parts, request.nsamples))
    return {"fingerprint": fingerprint_of(said), **said}


def describe_inputs(checkpoint: Checkpoint, request: Request, found: Sequence[Located]) -> dict[str, Any]:
    """Everything the result of a calibration depends on."""
    code = code_of(CODE)
    return {
        **describe_dataset(checkpoint, request, found),
        "checkpoint": {"fingerprint": checkpoint.weights_fingerprint(), "model_type": checkpoint.config.model_type},
        "embed_scale": request.embed_scale,
        "code": {"sha256": code.sha256, "libraries": code.versions},
    }


def fingerprint_of(said: Mapping[str, Any]) -> str:
    """sha256 over a description."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def tokenizer_sha256(checkpoint: Checkpoint) -> str:
    """Hash of the tokenizer's files, names included; of a GGUF file without any: of its header and config."""
    files = checkpoint.tokenizer_files()
    if not files:
        return checkpoint.fingerprint(times=False)
    digest = hashlib.sha256()
    for file in files:
        content = read_bytes(file, TOKENIZER_FILE)
        digest.update(f"{file.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def make_windows(checkpoint: Checkpoint, request: Request, found: Sequence[Located] | None = None) -> TokenWindows:
    """Read, shuffle, render, tokenize and cut each data set, and mix the windows.

    Args:
        found: the data sets, when they have been located before.

    Returns:
        Windows in the order of `turn_order`: the first few are a mix already.

    Raises:
        CalibrationError: of every data set that is damaged or too short; CheckpointError: no usable tokenizer.
    """
    found = locate(request.mix.parts, request.nsamples) if found is None else found
    tokenizer, chat = load_tokenizer_and_chat(checkpoint, chat=any(one.source.turns for one in found))
    bos_id = checkpoint.config.bos_token_id
    assert bos_id is not None  # see check()

    def cut(one: Located) -> Cut:
        texts, joint = _texts(one, chat)
        return cut_windows(
            shuffled(texts, request.seed),
            tokenizer,
            one,
            bos_id=bos_id,
            seqlen=request.seqlen,
            joint=joint,
        )

    cuts = each(cut, found)
    rows = [iter(one.ids) for one in cuts]
    ids = np.stack([next(rows[part]) for part in turn_order([one.windows for one in found])])
    return TokenWindows(ids, {one.name: made.texts_used for one, made in zip(found, cuts, strict=True)})


def fit_to_sample(checkpoint: Checkpoint, request: Request) -> Request:
    """For a request whose number of windows is a default: no more of them than the bundled sample holds.

    Args:
        request: of one data set; one that is read from a file or the hub is returned as it is.

    Raises:
        UsageError: the request makes no sense; CalibrationError: the sample is damaged.
        CheckpointError: no usable tokenizer.
    """
    check(checkpoint, request, KEYS)
    (part,) = request.mix.parts
    if part.place is not None:
        return request
    (sample,) = locate(request.mix.parts, request.nsamples)
    tokenizer, chat = load_tokenizer_and_chat(checkpoint, chat=sample.source.turns is not None)
    texts, joint = _texts(sample, chat)
    encoded = tokenizer.encode_batch([text + joint for text in texts()])
    bos = checkpoint.config.bos_token_id
    holds = sum(token != bos for ids in encoded for token in ids) // (request.seqlen - 1)
    if not 0 < holds < request.nsamples:  # none at all: cutting them says what to do
        return request
    log.debug(
        "calibrating on %d windows of %d tokens, all that the bundled %s sample holds; dataset.path names real text",
        holds,
        request.seqlen,
        part.name,
    )
    return replace(request, nsamples=holds)


def _texts(one: Located, chat: Chat | None) -> tuple[Callable[[], Iterator[str]], str]:
    """A data set's texts, in turns where there is a chat template for them, and what stands behind each."""
    if chat is not None and (turns := one.source.turns) is not None:
        return (lambda: map(partial(_in_turns, chat, turns), one.rows())), chat.joint
    return (lambda: map(one.source.text, one.rows())), JOINT


def _in_turns(chat: Chat, turns: Callable[[Row], Turns], row: Row) -> str:
    return chat.render(turns(row))


def measure(
    checkpoint: Checkpoint,
    windows: TokenWindows,
    request: Request,
    *,
    scratch: Path,
    progress: Tick | None,
    processes: int = 1,
    cluster: str | None = None,
) -> dict[str, Range]:
    """Ranges of every point over all windows."""
    from gemma_deploy.calibration.executors import open_executor
    from gemma_deploy.calibration.ranges import run_layers

    with open_executor(scratch / "shards", processes=processes, cluster=cluster) as executor:
        found = run_layers(
            checkpoint,
            windows.ids,
            scratch=scratch,
            embed_scale=request.embed_scale,
            progress=progress,
            executor=executor,
        )
    return {
        point: Range(np.asarray(seen.minimum.numpy()), np.asarray(seen.maximum.numpy()))
        for point, seen in found.items()
    }
