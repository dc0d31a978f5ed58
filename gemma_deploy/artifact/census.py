"""How many nodes of each operator a graph has."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

OPERATION = re.compile(r'<layer [^>]*? type="(\w+)"')  # of a layer in OpenVINO's XML


def op_census(path: Path) -> dict[str, int]:
    """Nodes per operator of a graph: of an .onnx file those of branches too, custom ones with their domain."""
    if path.suffix == ".xml":
        return dict(sorted(Counter(OPERATION.findall(path.read_text())).items()))
    import onnx

    counts: Counter[str] = Counter()
    graphs = [onnx.load(str(path), load_external_data=False).graph]
    while graphs:
        for node in graphs.pop().node:
            counts[f"{node.domain}::{node.op_type}" if node.domain else node.op_type] += 1
            graphs += [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
    return dict(sorted(counts.items()))
