"""Perplexity of an artifact on the bundled text, and its gates once more.

Use: python examples/evaluate.py ARTIFACT
"""

import sys

from gemma_deploy import evaluate, prove

if len(sys.argv) != 2:
    sys.exit(__doc__)

found = evaluate(sys.argv[1], against="none", windows=2, seqlen=64)
print(f"perplexity {found.perplexity:.2f} ± {found.perplexity_error:.2f} of {found.scored_tokens} tokens")

gate = prove(sys.argv[1])
for line in gate.lines:
    print(f"{'ok    ' if line.passed else 'FAILED'}  {line.comparison}  {line.name}  {line.value} (limit {line.limit})")
sys.exit(not gate.passed)
