"""Graphs that were made before, for tests of what happens around an export. It imports little and no onnxruntime: the
driver of tests/test_compile.py forks, and importing onnxruntime starts a thread that a forked child waits for."""

import json

from gemma_deploy.backends.base import Exported


def exported_before(finished):
    """`worker.export_apart` without an export: the graphs of a finished artifact."""
    contract = json.loads((finished / "manifest.json").read_text())["contract"]

    def export(task):
        assert json.loads(json.dumps(task.contract.to_json())) == contract
        return Exported({f"{name}.onnx": (finished / f"{name}.onnx").read_bytes() for name in contract["graphs"]}, 1)

    return export
