"""What an artifact's graphs take and give, read from its manifest or, before there is one, from the graphs.

Used by the runner; the writing side is graph/contract.py, which this package does not import (it needs torch's half).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_deploy.artifact.manifest import ContractRecord, Manifest
from gemma_deploy.artifact.opened import manifest_of
from gemma_deploy.dtypes import BY_NAME, BY_ONNX, BY_ONNXRUNTIME
from gemma_deploy.errors import ArtifactError
from gemma_deploy.graph.contract import Port
from gemma_deploy.names import MANIFEST
from gemma_deploy.reading import exists
from gemma_deploy.runtime.limits import REBUILD

if TYPE_CHECKING:
    import onnxruntime as ort

PartFolders = Sequence[Sequence[str]]  # folders of the ranks of each stage; none of an undivided artifact
GRAPHS = ("iter0", "iter1")
CACHE_DTYPES = ("float32", "float16", "int8")


@dataclass(frozen=True)
class StaticContract:
    """Sizes of a pair of graphs.

    Args:
        batch: B; prefill: P; context: C, cache slots.
        caches: inputs of iter1 named past_key_values.{layer}.{key|value}, each [B, Hk, C, D]; after one of int8 codes
            comes its `_scale` [B, Hk, C, 1].
        dynamic: the graphs take any batch and lengths; B is what the recipe said, P and C are the largest.
    """

    batch: int
    prefill: int
    context: int
    vocab_size: int
    caches: tuple[Port, ...]
    dynamic: bool = False

    def sized(self, batch: int, prefill: int, context: int) -> StaticContract:
        """The same with other sizes."""
        caches = tuple(replace(port, shape=(batch, port.shape[1], context, port.shape[3])) for port in self.caches)
        return replace(self, batch=batch, prefill=prefill, context=context, caches=caches)

    def ports(self, graph: str) -> tuple[Port, ...]:
        """Every input and output of `iter0` or `iter1`, as the graph declares them."""
        prefill = graph == "iter0"
        batch: int | str = self.batch
        context: int | str = self.context
        length: int | str
        keys: int | str
        length, keys = (self.prefill, self.prefill) if prefill else (1, self.context + 1)
        if self.dynamic:
            batch, length, context = "batch", "sequence", "past_sequence"
            keys = length if prefill else f"{context} + {length}"
        ports = [
            Port("input_ids", "int64", (batch, length)),
            Port("attention_mask", "int64", (batch, keys)),
            Port("position_ids", "int64", (batch, length)),
            Port("logits", "float32", (batch, 1, self.vocab_size)),
        ]
        for cache in self.caches:
            _, heads, _, size = cache.shape
            present = cache.name.replace("past_key_values", "present")
            ports.append(Port(present, cache.dtype, (batch, heads, length, size)))
            if not prefill:
                ports.append(replace(cache, shape=(batch, heads, context, size)))
        return tuple(ports)

    @property
    def cache_bytes(self) -> int:
        """Of all caches together."""
        total = 0
        for port in self.caches:
            size = BY_NAME[port.dtype].itemsize
            for dim in port.shape:
                size *= int(dim)
            total += size
        return total


def read_manifest(path: Path) -> Manifest | None:
    """manifest.json of an artifact, None when it has none yet (an artifact that is still being made).

    Raises:
        ArtifactError: not a directory of an artifact, or the manifest is damaged.
    """
    file = path / MANIFEST
    if not exists(file):
        missing = [f"{graph}.onnx" for graph in GRAPHS if not (path / f"{graph}.onnx").exists()]
        if missing:
            raise ArtifactError(
                f"not an artifact: {MANIFEST} and {', '.join(missing)} are missing",
                where=str(path),
                expected=f"a directory with {MANIFEST}, iter0.onnx, iter1.onnx and params.safetensors",
                next_step="make one with `gemma-deploy compile RECIPE`",
            )
        return None
    return manifest_of(file)


def stages_of(manifest: Manifest | None) -> tuple[tuple[str, ...], ...]:
    """Folders of a divided artifact, the ranks of each stage together; () of an undivided one."""
    stages: dict[str, list[str]] = {}
    for part in manifest.parts if manifest else ():
        stages.setdefault(part.stage, []).append(part.folder)
    return tuple(map(tuple, stages.values()))


def read_contract(path: Path, manifest: Manifest | None) -> StaticContract:
    """The contract of an artifact.

    Raises:
        ArtifactError: the manifest has no contract, or not that of static graphs.
    """
    if manifest is None:
        return _contract({graph: _ports_in_file(path / f"{graph}.onnx") for graph in GRAPHS}, path, None)
    graphs = manifest.contract.graphs
    missing = [graph for graph in GRAPHS if graph not in graphs]
    if missing:
        raise ArtifactError(
            f"has no contract of {' and '.join(missing)}",
            where=str(path / MANIFEST),
            expected="contract.graphs.{iter0,iter1}.{inputs,outputs} with name, dtype and shape",
            next_step=REBUILD,
        )
    ports = {graph: {port.name: port for port in (*graphs[graph].inputs, *graphs[graph].outputs)} for graph in GRAPHS}
    return _contract(ports, path, manifest.contract)


def check_session(session: ort.InferenceSession, contract: StaticContract, graph: str, *, where: Path) -> None:
    """See that a graph takes and gives what the contract says; it may give more.

    Raises:
        ArtifactError: naming every input and output that differs.
    """
    found = {port.name: f"{_kind(port.type)} {port.shape}" for port in session.get_inputs()}
    taken = set(found)
    found |= {port.name: f"{_kind(port.type)} {port.shape}" for port in session.get_outputs()}
    ports = {port.name: f"{port.dtype} {list(port.shape)}" for port in contract.ports(graph)}
    problems = [
        f"{name}: {ports.get(name, 'not')} in the manifest, {found.get(name, 'not')} in the graph"
        for name in dict.fromkeys([*ports, *sorted(taken)])
        if ports.get(name) != found.get(name)
    ]
    if problems:
        raise ArtifactError("graph and manifest disagree", where=str(where), problems=problems, next_step=REBUILD)


def _contract(ports: Mapping[str, Mapping[str, Port]], path: Path, sizes: ContractRecord | None) -> StaticContract:
    """From ports; the sizes of dynamic graphs are in the manifest alone."""
    try:
        batch, prefill = ports["iter0"]["input_ids"].shape
        caches = tuple(port for name, port in ports["iter1"].items() if name.startswith("past_key_values."))
        columns = ports["iter1"]["attention_mask"].shape[-1]
        vocab_size = ports["iter1"]["logits"].shape[-1]
        dynamic = not all(isinstance(size, int) for size in (batch, prefill, columns))
        if dynamic:
            if sizes is None:
                raise KeyError("contract")
            batch, prefill, context = sizes.batch, sizes.prefill, sizes.context
            shapes = [(batch, port.shape[1], context, port.shape[3]) for port in caches]
            caches = tuple(replace(port, shape=shape) for port, shape in zip(caches, shapes, strict=True))
        else:
            context = int(columns) - 1
    except (KeyError, ValueError, IndexError) as error:
        raise ArtifactError(
            f"its graphs and manifest do not say how they are run: {type(error).__name__}: {error}",
            where=str(path),
            expected="prefill and decode graphs, and the sizes of dynamic ones in contract.{batch,prefill,context}",
            next_step=REBUILD,
        ) from error
    fits = (batch, context)
    odd = [port for port in caches if (port.shape[0], port.shape[2]) != fits or port.dtype not in CACHE_DTYPES]
    if odd or not caches:
        raise ArtifactError(
            "the caches do not fit the attention mask",
            where=str(path),
            problems=[f"{port.name}: {port.dtype} {list(port.shape)}" for port in odd] or ["iter1 has no cache inputs"],
            expected=f"float32, float16 or int8 [{batch}, heads, {context}, head_dim]",
            next_step=REBUILD,
        )
    return StaticContract(int(batch), int(prefill), context, int(vocab_size), caches, dynamic)


def _ports_in_file(file: Path) -> dict[str, Port]:
    import onnx

    graph = onnx.load(str(file), load_external_data=False).graph
    ports = {}
    for value in (*graph.input, *graph.output):
        tensor = value.type.tensor_type
        shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        ports[value.name] = Port(
            value.name, BY_ONNX[tensor.elem_type].name if tensor.elem_type in BY_ONNX else "?", shape
        )
    return ports


def _kind(onnxruntime: str) -> str:
    """The dtype that a session means; its own word for one that is not known here."""
    return BY_ONNXRUNTIME[onnxruntime].name if onnxruntime in BY_ONNXRUNTIME else onnxruntime
