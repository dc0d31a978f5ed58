"""Counters and histograms of one artifact, as Prometheus reads them."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gemma_deploy.serve.request import Counts
from gemma_deploy.serve.worker import Actor

QUEUE_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
FIRST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
NEXT_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class Histogram:
    """How often a number of seconds was how large."""

    def __init__(self, edges: tuple[float, ...]) -> None:
        self._edges, self._counts, self._sum = edges, [0] * (len(edges) + 1), 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self._counts[bisect.bisect_left(self._edges, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str, label: str) -> Iterator[str]:
        """As text."""
        total = 0
        for edge, count in zip((*map(str, self._edges), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{{label},le="{edge}"}} {total}'
        yield f"{name}_sum{{{label}}} {self._sum}"
        yield f"{name}_count{{{label}}} {total}"


@dataclass
class Metrics:
    """What came of the requests to an artifact.

    Args:
        finished: how many by the reason of their end.
        queue: seconds until a text began to be computed; first: to a first token; between: from token to token.
    """

    finished: dict[str, int] = field(default_factory=dict)
    queue: Histogram = field(default_factory=lambda: Histogram(QUEUE_SECONDS))
    first: Histogram = field(default_factory=lambda: Histogram(FIRST_SECONDS))
    between: Histogram = field(default_factory=lambda: Histogram(NEXT_SECONDS))

    def end(self, reason: str) -> None:
        """A text ended."""
        self.finished[reason] = self.finished.get(reason, 0) + 1


GAUGES = {
    "requests_running": "Texts that are being computed.",
    "requests_waiting": "Texts that wait.",
    "cache_bytes": "Bytes of keys and values.",
    "prefixes_kept": "Beginnings of texts that are kept.",
    "adapters_loaded": "Adapters that requests may name.",
    "sequences_held": "Beginnings that are kept and texts that are computed.",
}
COUNTERS = {
    "prompt_tokens_total": "Tokens of prompts that were read.",
    "prompt_tokens_cached_total": "Tokens of prompts that were known already.",
    "generation_tokens_total": "Tokens of answers.",
    "steps_total": "Steps of the model.",
    "preemptions_total": "Texts that were set back because memory was out.",
}


def _values(counts: Counts) -> Mapping[str, int]:
    return {
        "requests_running": counts.running,
        "requests_waiting": counts.waiting,
        "cache_bytes": counts.cache_bytes,
        "prefixes_kept": counts.kept,
        "adapters_loaded": counts.adapters,
        "sequences_held": counts.held,
        "prompt_tokens_total": counts.prompt_tokens,
        "prompt_tokens_cached_total": counts.cached_tokens,
        "generation_tokens_total": counts.tokens,
        "steps_total": counts.steps,
        "preemptions_total": counts.preempted,
    }


ACTORS = {
    "actor_up": ("gauge", "Whether what computes on a node of the cluster is there."),
    "actor_requests": ("gauge", "Texts that it has to compute."),
    "actor_restarts_total": ("counter", "How often another one took its place."),
}


def exposed(models: Mapping[str, tuple[Counts, Mapping[str, Metrics], Sequence[Actor]]]) -> str:
    """All artifacts, by name, as the text that Prometheus reads.

    Args:
        models: of each artifact its counts, what came of requests by adapter, "" for those without, and what computes
            it elsewhere.
    """
    lines: list[str] = []
    for kind, table in (("gauge", GAUGES), ("counter", COUNTERS)):
        for key, words in table.items():
            lines += [f"# HELP gemma_deploy_{key} {words}", f"# TYPE gemma_deploy_{key} {kind}"]
            lines += [
                f"gemma_deploy_{key}{{{_label('model', one)}}} {_values(counts)[key]}"
                for one, (counts, *_) in models.items()
            ]
    lines += _of_actors({one: actors for one, (_, _, actors) in models.items() if actors})
    requests = {
        _label("model", one) + ("," + _label("adapter", adapter) if adapter else ""): metrics
        for one, (_, by_adapter, _) in models.items()
        for adapter, metrics in by_adapter.items()
    }
    name = "gemma_deploy_requests_finished_total"
    lines += [f"# HELP {name} Texts that ended, by the reason.", f"# TYPE {name} counter"]
    for label, metrics in requests.items():
        lines += [f'{name}{{{label},reason="{reason}"}} {count}' for reason, count in metrics.finished.items()]
    for name, words, which in (
        ("gemma_deploy_time_in_queue_seconds", "From the request to the begin of its computation.", "queue"),
        ("gemma_deploy_time_to_first_token_seconds", "From the request to its first token.", "first"),
        ("gemma_deploy_inter_token_seconds", "From one token to the next.", "between"),
    ):
        lines += [f"# HELP {name} {words}", f"# TYPE {name} histogram"]
        for label, metrics in requests.items():
            lines += getattr(metrics, which).lines(name, label)
    return "\n".join(lines) + "\n"


def _of_actors(models: Mapping[str, Sequence[Actor]]) -> Iterator[str]:
    for key, (kind, words) in ACTORS.items() if models else ():
        yield from (f"# HELP gemma_deploy_{key} {words}", f"# TYPE gemma_deploy_{key} {kind}")
        for model, actors in models.items():
            for one in actors:
                value = {"actor_up": int(one.up), "actor_requests": one.requests}.get(key, one.restarts)
                if value is None:
                    continue
                label = _label("model", model) + "," + _label("actor", one.name)
                label += "," + _label("node", one.node) if key == "actor_up" else ""  # a counter's labels stay
                yield f"gemma_deploy_{key}{{{label}}} {value}"


def _label(key: str, value: str) -> str:
    return key + '="' + value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") + '"'
