"""`python -m tests.fuzz`: a table of what went wrong, per surface."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.fuzz.harness import EXCEPTION, LARGE, SLOW, Outcome, judge, run_many
from tests.fuzz.inputs import in_folder
from tests.fuzz.surfaces import NAMES, SURFACES

KINDS = (EXCEPTION, SLOW, LARGE)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--count", type=int, default=200, help="cases of each surface")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--surface", action="append", choices=NAMES, help="this one alone; may be repeated")
    parser.add_argument("--number", type=int, help="one case, in this process")
    parser.add_argument("--inputs", type=Path, help="where sound inputs are kept")
    parser.add_argument("--show", type=int, default=3, help="findings to show of each surface")
    options = parser.parse_args()
    names = options.surface or list(NAMES)
    with tempfile.TemporaryDirectory() as scratch:
        inputs = in_folder(options.inputs or Path(scratch) / "inputs")
        if options.number is not None:
            for name in names:
                folder = Path(scratch) / name
                folder.mkdir()
                finding, seconds, grown = judge(SURFACES[name], SURFACES[name].prepare(inputs, folder), options.number)
                print(f"{name} {options.number}: {seconds:.1f} s, {grown / 1e6:.0f} MB", finding or "as it should be")
            return 0
        print(f"{'surface':<20} {'cases':>6} {' / '.join(KINDS)}   slowest    most memory   seconds", flush=True)
        outcomes = []
        for name in names:
            outcome = run_many(SURFACES[name], inputs, Path(scratch), options.count, options.first)
            outcomes.append(outcome)
            print(line(outcome), flush=True)
            for finding in outcome.findings[: options.show]:
                print(f"  case {finding.number}, {finding.kind}: {finding.text}", flush=True)
    total = [sum(one.count(kind) for one in outcomes) for kind in KINDS]
    print(f"{'in all':<20} {sum(one.cases for one in outcomes):>6} {' / '.join(map(str, total))}")
    return int(any(total))


def line(outcome: Outcome) -> str:
    counts = " / ".join(str(outcome.count(kind)) for kind in KINDS)
    return (
        f"{outcome.surface:<20} {outcome.cases:>6} {counts:<40} {outcome.slowest:>6.1f} s "
        f"{outcome.largest / 1e6:>8.0f} MB {outcome.seconds:>8.0f}"
    )


if __name__ == "__main__":
    sys.exit(main())
