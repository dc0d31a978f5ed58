"""Runs the library of `backend.type: native` under the compiler's sanitizers: `python scripts/sanitize_native.py`.

Once with those for memory and undefined behaviour: products and attention of every level that this processor has
against sums in double precision (tests/native/check.cpp), and tiles in plain C++ (tiles.cpp). With these, and once more
with that for threads: the pool of threads (pool.cpp), and a small model under calls of the C ABI that are drawn at
random, many of them wrong (fuzz.cpp).

The models are random ones, compiled here: a Gemma 3, and those with per-layer embeddings, with experts, and with
several streams; `--plan` and `--parameters` take another. Needs a C++ compiler with sanitizers. Exits with 1 where one
finds something, and shows what.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import build_native  # noqa: E402

PROGRAMS = ROOT / "tests" / "native"
SANITIZERS: dict[str, tuple[str, ...]] = {
    "memory": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "threads": ("-fsanitize=thread",),
}
# Whole products in sanitized code take minutes at -O0; line numbers for what is found.
FLAGS = ("-O1", "-g")


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(SANITIZERS), help="one of them  [default: all]")
    parser.add_argument("--plan", type=Path, help="a plan, as text")
    parser.add_argument("--parameters", type=Path, help="the parameter file that belongs to it")
    parser.add_argument("--seconds", type=int, default=5, help="of random calls of each model  [default: 5]")
    given = parser.parse_args(arguments)
    if (given.plan is None) != (given.parameters is None):
        parser.error("--plan and --parameters go together")
    with tempfile.TemporaryDirectory(prefix="sanitize-native-") as folder:
        work = Path(folder)
        models = [(given.plan, given.parameters)] if given.plan else small_models(work)
        for name, flags in SANITIZERS.items():
            if given.only in (None, name) and not clean(name, work / name, (*flags, *FLAGS), models, given.seconds):
                return 1
    return 0


def small_models(work: Path) -> list[tuple[Path, Path]]:
    """The plans and the parameter files of random models in int8, in folders of their own."""
    from gemma_deploy.testing import TINY_EXPERTS, TINY_PER_LAYER

    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "gemma3": ("gemma3_text", {}),
        "per-layer": ("gemma4_text", TINY_PER_LAYER),
        "experts": ("gemma4_text", TINY_EXPERTS),
        "streams": ("gemma3n_text", {}),
    }
    return [small_model(work / name, kind, changes) for name, (kind, changes) in kinds.items()]


def small_model(work: Path, kind: str, changes: Mapping[str, Any]) -> tuple[Path, Path]:
    """The plan and the parameter file of a random model in int8.

    Args:
        kind: its model type; changes: of the small config of that type.
    """
    from gemma_deploy.backends.native.graph import plan_in
    from gemma_deploy.backends.native.library import FOLDER, LIBRARY
    from gemma_deploy.compile import compile_recipe
    from gemma_deploy.names import PARAMS
    from gemma_deploy.recipe import Recipe
    from gemma_deploy.testing import write_tiny_checkpoint

    if not (FOLDER / LIBRARY).is_file():
        build_native.build(FOLDER / LIBRARY)
    recipe = {
        "name": "small",
        "frontend": {
            "checkpoint": str(write_tiny_checkpoint(work / "checkpoint", kind, **changes)),
            "shape": {"input_ids": [[48], [400]]},
            "quantize": {"type": "w8a16"},
        },
        "backend": {"type": "native", "dtype": "int8"},
        "parity": {"gate": False},
        "workspace": {"path": str(work)},
    }
    file, plan = work / "recipe.json", work / "plan"
    file.write_text(json.dumps(recipe))
    made = compile_recipe(Recipe.load(file), parity=False).path
    plan.write_text(plan_in(made))
    return plan, made / PARAMS


def clean(name: str, folder: Path, flags: Sequence[str], models: Sequence[tuple[Path, Path]], seconds: int) -> bool:
    """Whether the programs, compiled with these flags, end as they should."""
    folder.mkdir()
    sources = ROOT / build_native.SOURCES
    library = [str(one) for one in build_native.objects(folder, extra=flags)]
    calls = [(*map(str, model), str(seed), str(seconds)) for seed, model in enumerate(models)]
    runs: dict[str, list[tuple[str, ...]]] = {"pool": [()], "fuzz": calls}
    if name != "threads":
        runs |= {"check": [()], "tiles": [()]}
    for program, all_arguments in runs.items():
        made = folder / program
        needs = {"pool": [str(folder / "pool.o")], "tiles": []}.get(program, library)
        source = [str(PROGRAMS / f"{program}.cpp"), f"-I{sources}"]
        build_native.run(
            [build_native.needed(), *build_native.FLAGS, *flags, *source, *needs, "-pthread", "-o", str(made)]
        )
        for arguments in all_arguments:
            done = subprocess.run(
                [str(made), *arguments],
                capture_output=True,
                text=True,
                env=os.environ | {"UBSAN_OPTIONS": "print_stacktrace=1"},
            )
            subject = " ".join([program, *(Path(one).parent.name for one in arguments[:1])])
            print(f"{name}: {subject}: {'' if done.returncode else done.stdout.strip()}", flush=True)
            if done.returncode:
                print(done.stdout + done.stderr, file=sys.stderr)
                return False
    return True


if __name__ == "__main__":
    sys.exit(main())
