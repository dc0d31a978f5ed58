"""A folder with good input, and one function for each way to make it bad; see test_bad_input.py."""

from __future__ import annotations

import csv
import errno
import gzip
import io
import json
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from gemma_deploy.cli import main
from tests.checkpoint.make import config, encode, weights, write_checkpoint, write_index, write_safetensors


class World:
    """A checkpoint, a recipe's content, and a workspace that is not there yet."""

    def __init__(self, root: Path, capsys: Any) -> None:
        self.root, self.capsys = root, capsys
        self.checkpoint, self.workspace = root / "model", root / "workspace"
        self.recipe = root / "recipe.yaml"
        self.content: dict[str, Any] = {
            "name": "bad",
            "frontend": {"checkpoint": str(self.checkpoint), "shape": {"input_ids": [[16], [32]]}},
            "backend": {"dtype": "int8"},
            "workspace": {"path": str(self.workspace)},
        }
        write_checkpoint(self.checkpoint)
        self.write_recipe()

    @property
    def weights(self) -> Path:
        return self.checkpoint / "model.safetensors"

    def write_recipe(self) -> None:
        self.recipe.write_text(yaml.safe_dump(self.content))

    def use(self, checkpoint: Path, kind: str = "huggingface") -> None:
        """Let the recipe name another checkpoint."""
        self.checkpoint = checkpoint
        self.content["frontend"] |= {"checkpoint": str(checkpoint), "type": kind}
        self.write_recipe()

    def change_config(self, **changes: Any) -> None:
        file = self.checkpoint / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    def run(self, *arguments: Any) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        self.capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *self.capsys.readouterr()

    def files(self) -> dict[str, bytes | None]:
        """Everything there is: path -> content, None for a directory."""
        found = sorted(self.root.rglob("*"))
        return {str(path.relative_to(self.root)): path.read_bytes() if path.is_file() else None for path in found}


# --- checkpoints ---------------------------------------------------------------------------------------------------


def cut_weights(world: World) -> None:
    world.weights.write_bytes(world.weights.read_bytes()[:-100])


def empty_weights(world: World) -> None:
    world.weights.write_bytes(b"")


def header_longer_than_the_file(world: World) -> None:
    world.weights.write_bytes(struct.pack("<Q", 1 << 40) + world.weights.read_bytes()[8:])


def offsets_outside(world: World) -> None:
    header, data = encode(weights(config()))
    header["model.norm.weight"]["data_offsets"] = [len(data) + 10, len(data) + 74]
    write_safetensors(world.weights, header, data)


def sharded(world: World) -> dict[str, np.ndarray]:
    shutil.rmtree(world.checkpoint)
    return write_checkpoint(world.checkpoint, shards=2)


def missing_shard(world: World) -> None:
    sharded(world)
    (world.checkpoint / "model-00002-of-00002.safetensors").unlink()


def index_names(name: str) -> Callable[[World], None]:
    def change(world: World) -> None:
        write_index(world.checkpoint, dict.fromkeys(sharded(world), name))

    return change


def index_is(text: str) -> Callable[[World], None]:
    def change(world: World) -> None:
        sharded(world)
        (world.checkpoint / "model.safetensors.index.json").write_text(text)

    return change


def pickle_only(world: World) -> None:
    world.weights.unlink()
    (world.checkpoint / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


def tensors_changed(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[World], None]:
    def apply(world: World) -> None:
        tensors = weights(config())
        change(tensors)
        write_checkpoint(world.checkpoint, tensors=tensors)

    return apply


def lose(tensors: dict[str, np.ndarray]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def add(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.9.stranger.weight"] = np.zeros(3, np.float32)


def misshape(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((16, 16), np.float32)


def all_three(tensors: dict[str, np.ndarray]) -> None:
    for change in (lose, add, misshape):
        change(tensors)


def poison(name: str, at: tuple[int, ...], value: float) -> Callable[[World], None]:
    return tensors_changed(lambda tensors: tensors[name].__setitem__(at, value))


def no_config(world: World) -> None:
    (world.checkpoint / "config.json").unlink()


def config_is(text: str) -> Callable[[World], None]:
    return lambda world: (world.checkpoint / "config.json").write_text(text) and None


def config_is_a_directory(world: World) -> None:
    no_config(world)
    (world.checkpoint / "config.json").mkdir()


def config_with(**changes: Any) -> Callable[[World], None]:
    return lambda world: world.change_config(**changes)


def gguf(architecture: str, keep: slice) -> Callable[[World], None]:
    def change(world: World) -> None:
        import gguf as library

        shutil.rmtree(world.checkpoint)
        file = world.root / "model.gguf"
        writer = library.GGUFWriter(file, architecture)
        writer.add_block_count(1)
        writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        file.write_bytes(file.read_bytes()[keep])
        world.use(file, "gguf")

    return change


def nowhere(world: World) -> None:
    world.use(world.root / "nowhere")


def gemma_2_9b(folder: Path, scalar: int) -> Path:
    """Its layers' widths in files of holes: headers are real, weights are zeros that take no disk."""
    raw = config(
        "gemma2", num_hidden_layers=2, hidden_size=3584, num_attention_heads=16, num_key_value_heads=8, head_dim=256,
        query_pre_attn_scalar=scalar,
    )  # fmt: skip
    from gemma_deploy.checkpoint import ModelConfig, expected_tensors

    header, offset = {}, 0
    for name, shape in expected_tensors(ModelConfig.from_dict(raw, "config.json")).items():
        stop = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    write_safetensors(folder / "model.safetensors", header, b"")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) + offset)
    return folder


# --- artifacts: functions of the artifact's directory --------------------------------------------------------------


def flip(name: str) -> Callable[[Path], None]:
    """One bit, in the middle of a file."""

    def change(artifact: Path) -> None:
        file = artifact / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    return change


def flip_weight(name: str) -> Callable[[Path], None]:
    """One bit of the last weight of an int8 matrix, which changes by 64 steps."""

    def change(artifact: Path) -> None:
        rows = json.loads((artifact / "manifest.json").read_text())["params"]
        row = next(row for row in rows if row["name"] == name)
        with (artifact / "params.safetensors").open("r+b") as file:
            file.seek(row["offset"] + row["nbytes"] - 1)
            (value,) = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([value ^ 64]))

    return change


def without(name: str) -> Callable[[Path], None]:
    return lambda artifact: (artifact / name).unlink()


def cut(name: str) -> Callable[[Path], None]:
    return lambda artifact: (artifact / name).write_bytes((artifact / name).read_bytes()[:1000]) and None


def manifest_with(**changes: Any) -> Callable[[Path], None]:
    def change(artifact: Path) -> None:
        file = artifact / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def flip_manifest_key(artifact: Path) -> None:
    """One bit turns the key `prefill` into `qrefill`."""
    file = artifact / "manifest.json"
    data = file.read_bytes()
    assert data.count(b'"prefill":') == 1
    file.write_bytes(data.replace(b'"prefill":', b'"qrefill":'))


def tokenizer_is_cut(artifact: Path) -> None:
    cut("tokenizer.json")(artifact)


# --- calibration data: functions of the file's path ----------------------------------------------------------------


def gzip_of(*texts: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)

    return write


def cut_gzip(path: Path) -> None:
    gzip_of(*("words " * 200 + str(i) for i in range(50)))(path)
    path.write_bytes(path.read_bytes()[:-200])


def wrong_header(path: Path) -> None:
    table = io.StringIO()
    csv.writer(table).writerows([["id", "frage", "A", "B", "C", "D", "answer"], [0, "x", "a", "b", "c", "d", "A"]])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("val/physics_val.csv", table.getvalue())


def bytes_of(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


# --- the machine ---------------------------------------------------------------------------------------------------


def refusing(number: int, words: str) -> Callable[..., Any]:
    """A function that fails as the system does."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, words)

    return refuse


full = refusing(errno.ENOSPC, "No space left on device")


def full_for_blocks(write: Callable[..., int]) -> Callable[..., int]:
    """`os.pwrite` on a disk that still has room for a line."""
    return lambda fd, data, at: full() if len(data) > 64 else write(fd, data, at)


def interrupted(*args: Any, **kwargs: Any) -> Any:
    """What Ctrl-C does to whatever runs."""
    raise KeyboardInterrupt
