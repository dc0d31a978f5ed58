"""Results as a Markdown table and as JSON, medians over the rounds."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from statistics import median
from typing import Any

from peer_runtimes.ours import NAME

RUN = ("load_s", "ttft_s", "prefill_tok_s", "decode_tok_s", "peak_rss_bytes")
RATIOS = ("prefill_tok_s", "decode_tok_s", "ttft_s")
HEADER = (
    "what", "convert s", "convert peak MiB", "artifact MB", "load s", "first token s", "prefill tok/s", "decode tok/s",
    "run peak MiB", "ours / it: prefill, decode, first token", "perplexity (fp32)", "mean KL", "top-1",
)  # fmt: skip


def summary(values: dict[str, Any], names: list[str]) -> dict[str, dict[str, Any]]:
    """By variant, ours first: conversion, medians and ranges of the runs, medians of the ratios to ours beside it."""
    ran = [(one["beside"], one["results"]) for one in values["runs"]]
    rows = {}
    for name in [NAME, *names]:
        row: dict[str, Any] = {"convert": values["conversions"].get(name), "quality": values["quality"].get(name)}
        found = [results[name] for _, results in ran if name in results]
        row["problem"] = next((one["problem"] for one in found if "problem" in one), None)
        good = [one for one in found if "problem" not in one]
        row["processes"] = len(good)
        row["run"] = {key: median(one[key] for one in good) for key in RUN} if good else None
        row["range"] = {key: [min(v), max(v)] for key in RUN if (v := [one[key] for one in good])}
        pairs = [
            (results[NAME], results[name])
            for beside, results in ran
            if beside == name and NAME in results and name in results
            if "problem" not in results[NAME] and "problem" not in results[name]
        ]
        row["ours_over_it"] = {key: median(a[key] / b[key] for a, b in pairs) for key in RATIOS if pairs}
        if found or row["convert"] or row["quality"]:
            rows[name] = row
    return rows


def markdown(rows: dict[str, dict[str, Any]], head: str) -> str:
    """A table; a problem stands where the figures would."""
    lines = [head, "", f"| {' | '.join(HEADER)} |", f"|{' --- |' * len(HEADER)}"]
    lines += [f"| {name} | {' | '.join(cells(row))} |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def cells(row: dict[str, Any]) -> list[str]:
    """Of one line, the name left out."""
    made, ran, good = row["convert"] or {}, row["run"], row["quality"] or {}
    found = [shown(made, "seconds", 1), shown(made, "peak_rss_bytes", 0, 1 << 20)]
    found.append(shown(made, "artifact_bytes", 1, 1e6))
    if ran:
        spread = {key: " ({:.0f}-{:.0f})".format(*row["range"][key]) for key in ("prefill_tok_s", "decode_tok_s")}
        found += [
            shown(ran, "load_s", 2),
            shown(ran, "ttft_s", 2),
            shown(ran, "prefill_tok_s", 0) + spread["prefill_tok_s"],
            shown(ran, "decode_tok_s", 1) + spread["decode_tok_s"],
            shown(ran, "peak_rss_bytes", 0, 1 << 20),
        ]
    else:
        found += ["", "", "", "", ""]
    found.append(", ".join(f"{row['ours_over_it'][key]:.2f}" for key in RATIOS) if row["ours_over_it"] else "")
    exact = f" ({good['perplexity_reference']:.3f})" if "perplexity_reference" in good else ""
    found += [shown(good, "perplexity", 3) + exact, shown(good, "mean_kl", 5), shown(good, "top1", 2, 0.01)]
    for problem, at in ((made.get("problem"), 0), (row["problem"], 3), (good.get("problem"), len(found) - 3)):
        if problem:
            found[at] = problem.replace("|", "/")
    return found


def shown(record: dict[str, Any], key: str, digits: int, unit: float = 1) -> str:
    """A figure in a unit, or nothing."""
    return f"{record[key] / unit:.{digits}f}" if key in record else ""


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpu = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":", 1)[1].strip() for line in cpu if line.startswith("model name")), platform.machine())
    return {"cpu": name, "cores": os.cpu_count(), "load_average": os.getloadavg()[0], "kernel": platform.release()}
