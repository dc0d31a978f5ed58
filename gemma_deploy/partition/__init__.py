"""How a model is divided among devices: by layers into stages (`split`), and inside every layer into ranks (`tp`).

Pure arithmetic on a config; used by the torch parts (split/), the parameter file (params/) and the graphs (graph/).
"""

from gemma_deploy.partition.parts import ArtifactPart, division_problems, parts_of
from gemma_deploy.partition.spans import Span, recommended_points, span_bytes, spans_of, whole

__all__ = [
    "ArtifactPart",
    "Span",
    "division_problems",
    "parts_of",
    "recommended_points",
    "span_bytes",
    "spans_of",
    "whole",
]
