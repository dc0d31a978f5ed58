"""The .onnx files of an artifact."""

from dataclasses import dataclass
from pathlib import Path
from random import Random

import onnx

from tests.fuzz import mutate
from tests.fuzz.harness import Surface, run
from tests.fuzz.inputs import Inputs, copy
from tests.fuzz.surfaces.tokenizer_json import replace

LOCATIONS = ("/etc/passwd", "../params.safetensors", "", "nothing", "x" * 300, "manifest.json", "a\0b")


@dataclass
class State:
    files: dict[Path, bytes]


def prepare(inputs: Inputs, folder: Path) -> State:
    files = {}
    for kind in ("static", "genai"):
        artifact = copy(inputs.artifact(kind), folder / kind)
        files |= {file: file.read_bytes() for file in artifact.glob("*.onnx")}
    return State(files)


def attempt(state: State, random: Random) -> None:
    file, raw = random.choice(list(state.files.items()))
    for other, content in state.files.items():
        if other.parent == file.parent:
            replace(other.parent, other.name, content)
    changed = mutate.raw_bytes(raw, random) if random.random() < 0.5 else edited(raw, random)
    replace(file.parent, file.name, changed)
    command = random.choice((("verify",), ("run", "-p", "the", "-n", "1"), ("inspect",)))
    run(command[0], file.parent, *command[1:])


def edited(raw: bytes, random: Random) -> bytes:
    """A graph that can be read and says something else."""
    model = onnx.ModelProto.FromString(raw)
    graph = model.graph
    for _ in range(random.randint(1, 2)):
        node = random.choice(graph.node)
        match random.randrange(11):
            case 0:
                node.op_type = random.choice(("Add", "MatMul", "If", "Nothing", "GroupQueryAttention", ""))
            case 1:
                node.domain = random.choice(("", "ai.onnx", "com.microsoft", "nobody"))
            case 2 if node.input:
                node.input[random.randrange(len(node.input))] = random.choice(
                    ("", "nothing", "input_ids", node.output[0])
                )
            case 3:
                node.output[0] = random.choice(("", "logits", graph.node[0].output[0]))
            case 4:
                del graph.node[random.randrange(len(graph.node)) :]
            case 5 if node.attribute:
                attribute = random.choice(node.attribute)
                attribute.i, attribute.type = random.choice((-1, 0, 2**40)), random.choice((1, 2, 3, 7))
            case 6 if graph.initializer:
                tensor = random.choice(graph.initializer)
                dims = random.choice(([], [0], [-1], [2**40], [1, 1, 1]))
                del tensor.dims[:]
                tensor.dims.extend(dims)
            case 7 if graph.initializer:
                tensor = random.choice(
                    [one for one in graph.initializer if one.external_data] or list(graph.initializer)
                )
                for entry in tensor.external_data:
                    if entry.key == "location":
                        entry.value = random.choice(LOCATIONS)
                    elif random.random() < 0.5:
                        entry.value = random.choice(("-1", "x", "", str(2**62), "0"))
            case 8 if graph.initializer:
                random.choice(graph.initializer).data_type = random.choice((0, 1, 3, 8, 10, 22, 99))
            case 9:
                value = random.choice([*graph.input, *graph.output])
                value.name = random.choice(("", "x", value.name + "2"))
            case _:
                model.opset_import[0].version = random.choice((0, 1, 99, 2**31))
    return model.SerializeToString()


SURFACE = Surface("graphs", prepare, attempt)
