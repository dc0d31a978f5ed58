"""What a stage will take and what it took; measured rates that estimates are made of."""

from __future__ import annotations

from dataclasses import dataclass

from gemma_deploy.bounds import Bytes
from gemma_deploy.names import GIB, MIB

# Peak RSS of a stage beyond its data, measured with transformers 5.23, torch 2.13 CPU on 2 cores of AMD Milan:
BASE_BYTES = int(0.45 * GIB)  # torch and numpy imported (torch alone: 0.34)
EXPORT_BYTES = int(0.55 * GIB)  # a gemma-2b-shaped decode graph traced and converted (docs/design.md 3)
WRITER_BYTES = int(0.34 * GIB)  # numpy and onnx imported, blocks of 2 MiB, pages of the checkpoint that are mapped
RUNTIME_BYTES = 448 * MIB  # ONNX Runtime with its arenas, beside the weights that a session packs, and logits of it
BLOCK_BYTES = 64 * MIB  # of a matrix of a model under comparison, as float32
GRAPH_BYTES = 1 * MIB  # the .onnx files, of 18 layers 0.3 to 0.9
RECORD_BYTES = MIB // 4  # manifest, report, config
# Rates on the same machine; the disk's are a 1 GiB dd without other load, the others a 64 MiB float32 block in numpy.
READ_BYTES_PER_S = 2.0e9
WRITE_BYTES_PER_S = 0.8e9
CAST_BYTES_PER_S = 1.5e9  # float32 bytes cast and hashed
QUANTIZE_BYTES_PER_S = 0.45e9  # float32 bytes rounded to int8 per row, with SQNR
FLOPS_PER_S = 1.0e11  # float32 GEMM on 2 cores (117 measured; torch 113, ORT 151: docs/design.md 3)
STREAM_BYTES_PER_S = 1.0e9  # float32 bytes read from the checkpoint, widened and multiplied, a matrix at a time
IMPORT_SECONDS = 4.0
EXPORT_SECONDS = 6.0
TOKENIZER_BYTES = 256 * MIB  # a vocabulary of 262,144 read by `tokenizers`
LARGE_VOCABULARY = 262_144
LEFT_BYTES = 128 * MIB  # of it and of stages before, which the system does not get back
LOGIT_SOURCES = 4  # models of which a block of logits is compared at a time (parity/compare.py)
PIECE_ELEMENTS = 1 << 23  # of a matrix that is solved at a time (quantization/solver.py)
PIECE_ARRAYS = 8  # float32 arrays of that size that are alive together
MOMENT_BYTES = 256 << 20  # of what experts read that are quantized together
LAYER_PASSES = 1.2  # of a window through a layer: once, waiting at each of the groups of linears; norms and files
SENSITIVITY_TOKENS, HEAD_BYTES = 256, 64 * MIB  # parity/sensitivity.py
SESSION_BYTES = 1.15  # of a packed int8 weight with its scales
TORCH_RUNS = 3  # transformers' class, the patched class, the patched class with the artifact's weights


@dataclass(frozen=True)
class StageEstimate:
    """Estimate of one stage: peak memory, bytes it leaves on disk, wall time in seconds."""

    name: str
    what: str
    ram_bytes: int
    disk_bytes: int
    seconds: float


@dataclass
class StageTiming:
    """One stage, finished or failed.

    Attributes:
        seconds: wall time; bytes: written.
        peak_rss_bytes: the highest the process has been up to its end, with what it held beside a child of its own.
        skipped: a run before this one had done it.
        child_rss_bytes: the highest of a child process; beside: it was at work during the stage before as well.
        failed: it ended with an error.
    """

    name: str
    seconds: float = 0.0
    peak_rss_bytes: Bytes = 0
    bytes: Bytes = 0
    skipped: bool = False
    note: str = ""
    child_rss_bytes: int = 0
    beside: bool = False
    failed: bool = False
