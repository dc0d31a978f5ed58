"""Evaluation harnesses as their users run them, against our server: lm-evaluation-harness and evalscope.

    python benchmarks/harnesses.py CHECKPOINT --out DIR --ours ARTIFACT --archive ceval-exam.zip
    python benchmarks/harnesses.py CHECKPOINT --out DIR --ours ARTIFACT --archive ceval-exam.zip --chat WITH_TEMPLATE

Each is installed at a fixed version into an environment of its own under DIR. Questions are the first of each subject
of C-Eval's validation split, `--questions` in all, five solved examples before each, as a local task: neither needs a
hub. What is run, each command written into DIR/NAME/harnesses.json with its seconds and scores:

- `served`: lm-eval `local-completions`, log-likelihoods through prompts of token ids, 16 a request, `echo`
- `hf`: the same task in lm-eval's own back end in bfloat16, our server stopped; in how many questions both choose the
  same, and how far their log-likelihoods are apart
- `generated`: `local-completions`, the letter made (`generate_until`)
- `chat`: `local-chat-completions`; `exam`: evalscope, accuracy through a service; both of `--chat`, an artifact whose
  tokenizer has a chat template, that of ARTIFACT where none is named
- `perf`: `evalscope perf` with random prompts and `ignore_eos`

Seconds are those of the harness's own evaluation, and of the whole process with Python's start. hf's BOS is asked for
in `local-completions` by `add_bos_token=True`; scores are equal within rounding where ARTIFACT has the weights that hf
computes with (`backend.dtype: bf16`), and within what int8 costs otherwise.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peer_runtimes.environments import folder, install
from peer_runtimes.measuring import guarded
from peer_runtimes.ours import NAME
from peer_runtimes.processes import PeerError, run
from peer_runtimes.servers import SERVERS, Start
from peer_runtimes.serving import Running, free_port
from peer_runtimes.variants import Command

from gemma_deploy.evaluation import ceval
from gemma_deploy.evaluation.prompts import CHOICES, prompt

STEPS = ("install", "served", "hf", "generated", "chat", "exam", "perf")
BATCH, SHOTS = 16, 5
HF_BATCH = 4  # it keeps the logits of all positions: 16 texts of 1,200 tokens are 10 GB, and as much again


def main() -> None:
    """Do the steps, and write what came of each."""
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: ended by SIGTERM"))  # so that servers are stopped
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    out = arguments.out.resolve()
    place = out / (arguments.name or arguments.checkpoint.resolve().name)
    place.mkdir(parents=True, exist_ok=True)
    bench = Harnesses(arguments, out, place)
    file = place / "harnesses.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    if "install" in arguments.steps:
        for name in ("lmeval", "evalscope"):
            guarded(name, "install", lambda name=name: install(name, out, None) or {})
    bench.write_tasks(arguments.archive.resolve(), arguments.questions)
    for step in [step for step in STEPS[1:] if step in arguments.steps]:
        found[step] = guarded(step, "harness", getattr(bench, step))
        sides = [found.get(side, {}).get("samples", []) for side in ("served", "hf")]
        found.pop("served over hf", None)
        if sides[0] and len(sides[0]) == len(sides[1]):  # an earlier run may have had other questions
            found["served over hf"] = compared(found["served"], found["hf"])
        file.write_text(json.dumps(found, indent=1, ensure_ascii=False))
    for name, one in found.items():
        shown = {key: value for key, value in one.items() if key not in ("command", "samples")}
        print(f"{name}: {json.dumps(shown, ensure_ascii=False)}")


class Harnesses:
    """The commands.

    Args:
        arguments: the command line; out: of environments; place: of what is written.
    """

    def __init__(self, arguments: argparse.Namespace, out: Path, place: Path) -> None:
        self.checkpoint, self.threads = arguments.checkpoint.resolve(), arguments.threads
        self.ours = arguments.ours.resolve()
        self.talking = arguments.chat.resolve() if arguments.chat else self.ours
        self.out, self.place, self.tasks = out, place, place / "tasks"

    def write_tasks(self, archive: Path, count: int) -> None:
        """Questions and lm-eval's descriptions of the tasks; evalscope's file of the same questions."""
        self.tasks.mkdir(exist_ok=True)
        asked = questions(archive, count)
        (self.tasks / "questions.jsonl").write_text(lines(asked))
        data = {"data_files": {"test": str(self.tasks / "questions.jsonl")}}
        common = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test", "doc_to_text": "{{prompt}}"}
        score = {"aggregation": "mean", "higher_is_better": True}
        chosen = {
            "task": "ceval_chosen", "output_type": "multiple_choice", "doc_to_choice": list(CHOICES),
            "target_delimiter": "", "doc_to_target": "{{['A', 'B', 'C', 'D'].index(answer)}}",
            "metric_list": [{"metric": "acc", **score}],
        }  # fmt: skip
        made = {
            "task": "ceval_made", "output_type": "generate_until", "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "temperature": 0, "do_sample": False},
            "metric_list": [{"metric": "exact_match", **score}],
        }  # fmt: skip
        for task in (chosen, made):  # JSON is YAML
            (self.tasks / f"{task['task']}.yaml").write_text(json.dumps({**common, **task, "metadata": {"version": 1}}))
        names = ("id", "question", *CHOICES, "answer")
        (self.tasks / "ceval_val.jsonl").write_text(lines([{name: one[name] for name in names} for one in asked]))

    def served(self) -> dict[str, Any]:
        """Log-likelihoods through our server."""
        return self._with_server(self.ours, lambda url: self._lm_eval("served", "ceval_chosen", self._completions(url)))

    def hf(self) -> dict[str, Any]:
        """The same in the harness's own back end."""
        model = f"pretrained={self.checkpoint},dtype=bfloat16,add_bos_token=True"
        words = ["--model", "hf", "--model_args", model, "--device", "cpu"]
        return self._lm_eval("hf", "ceval_chosen", words, batch=HF_BATCH)

    def generated(self) -> dict[str, Any]:
        """Texts through our server."""
        return self._with_server(
            self.ours, lambda url: self._lm_eval("generated", "ceval_made", self._completions(url))
        )

    def chat(self) -> dict[str, Any]:
        """Answers of a conversation."""

        def ask(url: str) -> dict[str, Any]:
            model = f"base_url={url}/v1/chat/completions,model={NAME},num_concurrent={BATCH},eos_string=<end_of_turn>"
            words = ["--model", "local-chat-completions", "--model_args", model, "--apply_chat_template"]
            return self._lm_eval("chat", "ceval_made", words, batch=1)

        return self._with_server(self.talking, ask)

    def exam(self) -> dict[str, Any]:
        """Answers of a service, scored by evalscope."""
        work = self.place / "evalscope"
        shutil.rmtree(work, ignore_errors=True)
        data = {"general_mcq": {"local_path": str(self.tasks), "subset_list": ["ceval"]}}
        options = {"max_tokens": 16, "temperature": 0}

        def ask(url: str) -> dict[str, Any]:
            words = [
                *("eval", "--model", NAME, "--api-url", f"{url}/v1", "--api-key", "none", "--work-dir", work),
                *("--eval-type", "openai_api", "--datasets", "general_mcq", "--dataset-args", json.dumps(data)),
                *("--generation-config", json.dumps(options), "--eval-batch-size", BATCH),
            ]
            record = self._run("exam", "evalscope", words)
            reports = sorted(work.rglob("general_mcq.json"))
            if not reports:
                raise PeerError("evalscope wrote no report")
            (metric,) = json.loads(reports[-1].read_text())["metrics"]
            return record | {"accuracy": metric["score"], "questions": metric["num"]}

        return self._with_server(self.talking, ask)

    def perf(self) -> dict[str, Any]:
        """A service, measured by evalscope."""
        work = self.place / "evalscope-perf"
        shutil.rmtree(work, ignore_errors=True)

        def ask(url: str) -> dict[str, Any]:
            words = [
                *("perf", "--url", f"{url}/v1/completions", "--api", "openai", "--model", NAME, "--outputs-dir", work),
                *("--tokenizer-path", self.checkpoint, "--dataset", "random", "--tokenize-prompt"),
                *("--min-prompt-length", 512, "--max-prompt-length", 512, "--max-tokens", 128, "--min-tokens", 128),
                *("--parallel", 1, 8, "-n", 2, 16, "--extra-args", json.dumps({"ignore_eos": True})),
            ]
            record = self._run("perf", "evalscope", words)
            files = sorted(work.rglob("benchmark_summary.json"))
            if not files:
                raise PeerError("evalscope wrote no summary")
            return record | {"summaries": [json.loads(file.read_text()) for file in files]}

        return self._with_server(self.ours, ask)

    def _completions(self, url: str) -> Command:
        model = {
            "base_url": f"{url}/v1/completions", "model": NAME, "tokenizer": self.checkpoint,
            "tokenizer_backend": "huggingface", "add_bos_token": True, "num_concurrent": 2, "max_length": 4096,
        }  # fmt: skip
        return ["--model", "local-completions", "--model_args", ",".join(f"{key}={one}" for key, one in model.items())]

    def _lm_eval(self, name: str, task: str, model: Command, batch: int = BATCH) -> dict[str, Any]:
        where = self.place / f"lm-eval-{name}"
        shutil.rmtree(where, ignore_errors=True)
        words = [*model, "--batch_size", batch, "--include_path", self.tasks, "--tasks", task]
        record = self._run(name, "lm_eval", [*words, "--output_path", where, "--log_samples"])
        result = json.loads(next(where.rglob("results_*.json")).read_text())
        scores = {key.split(",")[0]: value for key, value in result["results"][task].items() if "," in key}
        record |= {"evaluation_s": float(result["total_evaluation_time_seconds"]), "scores": scores}
        if task == "ceval_chosen":
            rows = [json.loads(line) for line in next(where.rglob("samples_*.jsonl")).read_text().splitlines()]
            rows.sort(key=lambda one: one["doc_id"])
            record["samples"] = [[float(value[0]) for value in one["filtered_resps"]] for one in rows]
        return record

    def _run(self, name: str, program: str, words: list[Any]) -> dict[str, Any]:
        environment = "lmeval" if program == "lm_eval" else program
        command = [str(folder(environment, self.out) / "bin" / program), *map(str, words)]
        ran = run(command, self.place / f"{name}.log", {"OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": ""})
        return {"command": command, "seconds": ran.seconds}

    def _with_server(self, artifact: Path, ask: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
        """What comes of asking a server of an artifact, which goes by our name."""
        port = free_port()
        start = Start(Path(), artifact, port, self.threads, 0)
        server = Running([*SERVERS[NAME].command(start), "--alias", NAME], {}, log=self.place / "serve.log", port=port)
        try:
            server.ready()
            return ask(server.url)
        finally:
            server.stop()


def questions(archive: Path, count: int) -> list[dict[str, str]]:
    """The first of each subject, so many in all, each with its whole prompt.

    Raises:
        SystemExit: the archive has fewer.
    """
    subjects, found = ceval.read(archive, "val", SHOTS, subjects=(), limit=None), list[dict[str, str]]()
    for name, (examples, rows) in subjects.items():
        found += [{**row, "prompt": prompt(name, examples, row)} for row in rows[: -(-count // len(subjects))]]
    if len(found) < count:
        raise SystemExit(f"error: {archive} has {len(found)} questions, {count} were asked for")
    return found[:count]


def compared(ours: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How near two runs of one task are."""
    pairs = list(zip(ours["samples"], other["samples"], strict=True))
    apart = [abs(a - b) for one, two in pairs for a, b in zip(one, two, strict=True)]
    return {
        "seconds": ours["seconds"] / other["seconds"],
        "evaluation_s": ours["evaluation_s"] / other["evaluation_s"],
        "accuracy": [one["scores"]["acc"] for one in (ours, other)],
        "same_choice": statistics.mean(one.index(max(one)) == two.index(max(two)) for one, two in pairs),
        "log_likelihoods_apart": {"mean": statistics.mean(apart), "largest": max(apart)},
    }


def lines(rows: list[dict[str, Any]]) -> str:
    """As JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ours", type=Path, required=True, metavar="ARTIFACT")
    parser.add_argument("--archive", type=Path, required=True, help="ceval-exam.zip")
    parser.add_argument("--chat", type=Path, metavar="ARTIFACT", help="with a chat template")
    parser.add_argument("--name", help="of the directory under --out; the checkpoint's unless given")
    parser.add_argument("--steps", nargs="+", default=STEPS, choices=STEPS)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


if __name__ == "__main__":
    main()
