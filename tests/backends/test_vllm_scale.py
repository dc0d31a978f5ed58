"""What docs/scale.md says of several devices: manifests for Kubernetes, and memory of each GPU."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from gemma_deploy.backends.base import Serving
from gemma_deploy.backends.vllm.serving import serve_command

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "examples" / "kubernetes"


def containers(kind, file):
    """Pod specs of a manifest, by role."""
    documents = {one["kind"]: one for one in yaml.safe_load_all((MANIFESTS / file).read_text())}
    spec = documents[kind]["spec"]
    if kind == "Deployment":
        return documents, {"leader": spec["template"]["spec"]}
    template = spec["leaderWorkerTemplate"]
    return documents, {role: template[f"{role}Template"]["spec"] for role in ("leader", "worker")}


@pytest.mark.parametrize(
    ("kind", "file", "how"),
    [
        ("Deployment", "vllm.yaml", Serving("0.0.0.0", 8000, tensor=2)),
        ("LeaderWorkerSet", "vllm-nodes.yaml", Serving("0.0.0.0", 8000, tensor=4, pipeline=2, ray=True)),
    ],
)
def test_manifests_run_the_command_that_is_printed(kind, file, how):
    documents, pods = containers(kind, file)
    contract = SimpleNamespace(context=2048)
    manifest = SimpleNamespace(name="gemma-vllm-int4", contract=contract)
    artifact = SimpleNamespace(path="/models/gemma", manifest=manifest)
    recipe = yaml.safe_load((ROOT / "build_in" / "vllm-int4.yaml").read_text())
    assert recipe["name"] == artifact.manifest.name
    assert recipe["frontend"]["shape"]["input_ids"][1] == [contract.context]
    (leader,) = pods["leader"]["containers"]
    words = [*leader["command"], *leader["args"]]
    wanted = serve_command(artifact, how)
    assert words[-len(wanted) :] == wanted
    assert documents["Service"]["spec"]["type"] == "ClusterIP"
    (port,) = leader["ports"]
    assert documents["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert port["containerPort"] == how.port
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert leader[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    gpus = sum(int(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) for pod in pods.values())
    assert gpus == how.tensor * how.pipeline
    for pod in pods.values():
        volumes = {one["name"]: one for one in pod["volumes"]}
        mounts = {one["name"]: one for one in pod["containers"][0]["volumeMounts"]}
        assert volumes["artifact"]["persistentVolumeClaim"]["readOnly"]
        assert mounts["artifact"]["readOnly"]
        assert mounts["artifact"]["mountPath"] == "/models"


def test_the_leader_waits_for_all_nodes_and_becomes_the_printed_command(tmp_path):
    """Its script in bash, with programs in the place of Ray's, Python's and vLLM's."""
    _, pods = containers("LeaderWorkerSet", "vllm-nodes.yaml")
    (leader,) = pods["leader"]["containers"]
    said = tmp_path / "said"
    for name, body in {
        "ray": f'echo "ray $*" >> {said}',
        "python3": f'echo asked >> {said}; [ "$(grep -c asked {said})" -gt 1 ] && echo 2 || echo 1',
        "sleep": "exit 0",
        "vllm": f'echo "vllm $*" >> {said}',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o700)
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LWS_GROUP_SIZE": "2"}
    subprocess.run([*leader["command"], *leader["args"]], env=variables, check=True, timeout=60)
    wanted = shlex.join(["vllm", "serve", *leader["args"]])
    assert said.read_text().splitlines() == ["ray start --head --port=6379", "asked", "asked", wanted]


def printed(*options):
    """Cells of the table."""
    words = [sys.executable, ROOT / "scripts" / "vllm_memory.py", *options]
    run = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    return [line.strip("| ").split(" | ") for line in run.stdout.splitlines()]


def test_memory_of_each_gpu_is_the_models_divided():
    """Gemma 2B by hand: linears and table are divided, norms and the one KV head are not."""
    kept = 2 * 18 + 1  # norms, of 2048 numbers
    linears = 18 * (2048 * 256 * (8 + 8) + 3 * 2048 * 16384)
    key_rows = 18 * 2 * 256 * 2048
    table, context, texts = 256000 * 2048, 1024, 2
    cache = 18 * 2 * 256 * context * texts
    head, _, line = printed("--model", "Gemma 2B", "--context", str(context), "--batch", str(texts))
    found = dict(zip(head[1:], map(float, line[1:]), strict=True))
    for ranks in (1, 2, 4):
        held = 2 * (kept * 2048 + (linears + table) / ranks + key_rows + cache)
        assert 0 <= found[f"bf16, tp {ranks}"] - held / 1e9 < 0.35, ranks  # what a step works on comes on top
    assert found["w4a16_gptq, tp 1"] < found["w8a8, tp 1"] < found["bf16, tp 1"]


def test_the_table_of_the_docs_is_the_one_that_is_printed():
    lines = (ROOT / "docs" / "scale.md").read_text().splitlines()
    for cells in printed("--model", "Gemma 3 270M", "--model", "Gemma 2 27B"):
        assert f"| {' | '.join(cells)} |" in lines
