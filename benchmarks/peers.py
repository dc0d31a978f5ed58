"""Other runtimes beside ours on one checkpoint: llama.cpp, onnxruntime-genai, OpenVINO GenAI, optimum-onnx.

    python benchmarks/peers.py CHECKPOINT --out DIR --ours ARTIFACT --recipe RECIPE.yaml --quality

Every peer is installed into an environment of its own under DIR (several GB, and minutes of compiler for llama.cpp,
which is built for this CPU), converts the checkpoint as its documentation says, and runs in a process of its own, one
after the other, ours before each: ours, peer 1, ours, peer 2, and so on, `--rounds` times over; figures are medians of
the rounds, and ratios medians of neighbours. A process loads the model (its files in the page cache), gives the first
token after a prompt of 512 (seconds since the process began), then, warm, prefills 512 and decodes 64 after 128,
`--repeats` times; `--prompt`, `--behind` and `--together` ask for other lengths, and for several texts at once. Memory
is that of the largest process of a conversion, and VmHWM of a run. `--quality` adds perplexity, mean KL and top-1
against transformers in float32 with eager attention, over up to 16 windows of 512 tokens with BOS.

A peer that cannot be installed, converted or run has its last line in the table instead. Steps that are done are not
done again: `--steps run` measures anew with what is there, `--again` converts again. Results: DIR/NAME/peers.md and
peers.json (`--name` keeps those of other lengths apart). What is imported here needs nothing but Python itself; ours
needs `gemma-deploy` in the environment of this script for `--recipe` and for artifacts of `backend.type: native`, which
run in our library; others run in onnxruntime-genai as released. `--also` adds more artifacts of ours as rows.

`--variants` names the peers; without it, all but those that are for one question each: llama.cpp in 4 bits, and
llama.cpp built for AVX2 alone, beside which `GEMMA_DEPLOY_KERNELS=avx2` makes our library take no more than that:

    GEMMA_DEPLOY_KERNELS=avx2 python benchmarks/peers.py CHECKPOINT --out DIR --ours ARTIFACT \
        --variants "llama.cpp Q8_0, AVX2 alone"
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path

from peer_runtimes.environments import install, python_of
from peer_runtimes.measuring import Bench, Results, convert, guarded, log, quality, rounds
from peer_runtimes.ours import NAME
from peer_runtimes.processes import PeerError, run
from peer_runtimes.tables import machine, markdown, summary
from peer_runtimes.variants import HERE, USUAL, VARIANTS

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("install", "convert", "run", "quality")


def main() -> None:
    """Do the steps and write the table."""
    arguments = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    out = arguments.out.resolve()
    place = out / (arguments.name or arguments.checkpoint.resolve().name)
    place.mkdir(parents=True, exist_ok=True)
    paths = [path.resolve() if path else None for path in (arguments.lock, arguments.ours, arguments.recipe)]
    bench = Bench(arguments.checkpoint.resolve(), out, place, arguments.threads, *paths)
    also = {f"{NAME} {path.resolve().name}": path.resolve() for path in arguments.also}
    sizes = [f"--{name}={getattr(arguments, name)}" for name in ("prompt", "behind", "together")]
    bench = dataclasses.replace(bench, also=also, sizes=sizes)
    names, steps = [*also, *arguments.variants], arguments.steps
    if arguments.recipe and not arguments.ours:
        bench = dataclasses.replace(bench, ours=place / "ours")
    problems = {}
    if "install" in steps:
        for environment in dict.fromkeys(["genai", *(VARIANTS[name].environment for name in arguments.variants)]):
            log.info("installing %s", environment)
            try:
                install(environment, out, arguments.torch_index)
            except PeerError as error:
                problems[environment] = f"not installed: {error}"
                log.info("%s: %s", environment, problems[environment])
    tokenize(bench, arguments.text.resolve(), arguments.tokens)
    results = Results(place / "results.json")
    if "convert" in steps:
        for name in [NAME] * bool(bench.recipe) + arguments.variants:
            done = "seconds" in results.values["conversions"].get(name, {}) and bench.opened(name).exists()
            if done and not arguments.again:
                continue
            missing = problems.get(VARIANTS[name].environment) if name in VARIANTS else None
            record = {"problem": missing} if missing else guarded(name, "convert", lambda n=name: convert(bench, n))
            results.values["conversions"][name] = record
            results.save()
    if "run" in steps:
        rounds(bench, names, arguments.rounds, arguments.repeats, results)
    if arguments.quality is not None and "quality" in steps:
        reference = arguments.quality.resolve() if arguments.quality != Path() else log_probabilities(bench)
        for name in [NAME] * bool(bench.ours) + names:
            results.values["quality"][name] = guarded(name, "quality", lambda n=name: quality(bench, n, reference))
            results.save()
    rows, about = summary(results.values, names), machine()
    head = f"{place.name}, {arguments.threads} threads, {about['cpu']}, {about['cores']} cores"
    table = markdown(rows, head)
    (place / "peers.md").write_text(table)
    (place / "peers.json").write_text(json.dumps({"machine": about, "rows": rows, "raw": results.values}, indent=1))
    sys.stdout.write(table)


def tokenize(bench: Bench, text: Path, count: int) -> None:
    """Token ids of the text, unless they are there.

    Raises:
        SystemExit: there is no environment to make them in, or it failed.
    """
    if bench.ids.exists():
        return
    try:
        script = [python_of("genai", bench.out), HERE / "tokens.py"]
        words = [*script, bench.checkpoint, text, bench.ids, count]
        run(list(map(str, words)), bench.log("ids", "tokens"))
    except PeerError as error:
        raise SystemExit(f"error: {text} could not be tokenized: {error}") from error


def log_probabilities(bench: Bench) -> Path:
    """The reference's, computed once: 8.6 GB for 16 windows of a vocabulary of 262,144.

    Raises:
        SystemExit: that failed.
    """
    file = bench.place / "reference.npy"
    if not file.exists():
        try:
            script = [python_of("genai", bench.out), HERE / "reference.py"]
            words = [*script, bench.checkpoint, bench.ids, file, bench.threads]
            run(list(map(str, words)), bench.log("fp32", "reference"))
        except PeerError as error:
            raise SystemExit(f"error: no reference: {error}") from error
    return file


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", help="of the model's directory under --out; the checkpoint's unless given")
    parser.add_argument("--ours", type=Path, metavar="ARTIFACT", help="that onnxruntime-genai can load")
    parser.add_argument("--also", type=Path, nargs="+", default=[], metavar="ARTIFACT", help="of ours, one row each")
    parser.add_argument("--recipe", type=Path, help="compiled as ours, and timed; its artifact is --ours when given")
    parser.add_argument("--variants", nargs="+", default=list(USUAL), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--steps", nargs="+", default=STEPS, choices=STEPS)
    parser.add_argument("--again", action="store_true", help="convert what is converted too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3, help="of the warm measurements in each process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the long prompt")
    parser.add_argument("--behind", type=int, default=128, help="tokens before those that are decoded")
    parser.add_argument("--together", type=int, default=1, help="texts decoded at once; the rate is that of all")
    parser.add_argument("--tokens", type=int, default=16 * 511, help="of the text, that are made")
    parser.add_argument("--text", type=Path, default=ROOT / "gemma_deploy" / "demo" / "heldout.txt")
    parser.add_argument("--quality", type=Path, nargs="?", const=Path(), metavar="LOG_PROBABILITIES.npy")
    parser.add_argument("--lock", type=Path, help="a file to lock (flock) while something is timed")
    parser.add_argument("--torch-index", metavar="URL", help="where pip finds torch for the CPU")
    return parser.parse_args()


if __name__ == "__main__":
    main()
