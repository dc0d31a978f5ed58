"""How a model is divided among devices: by layers into stages (`split`), and inside every layer into ranks (`tp`).

Pure arithmetic on a config; used by the torch parts (split/), the parameter file (params/) and the graphs (graph/).
"""

from typing import TYPE_CHECKING

from gemma_deploy.offering import offering

if TYPE_CHECKING:
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
__getattr__ = offering(
    __name__,
    {
        "ArtifactPart": "gemma_deploy.partition.parts",
        "Span": "gemma_deploy.partition.spans",
        "division_problems": "gemma_deploy.partition.parts",
        "parts_of": "gemma_deploy.partition.parts",
        "recommended_points": "gemma_deploy.partition.spans",
        "span_bytes": "gemma_deploy.partition.spans",
        "spans_of": "gemma_deploy.partition.spans",
        "whole": "gemma_deploy.partition.spans",
    },
)
