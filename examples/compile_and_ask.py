"""Compile the bundled demo checkpoint, and continue a text with what came of it.

Use: python examples/compile_and_ask.py [WORKSPACE]
"""

import sys

from gemma_deploy import GenerationStats, Recipe, compile_recipe, open_engine

if len(sys.argv) > 2 or "--help" in sys.argv:
    sys.exit(__doc__)

workspace = sys.argv[1] if len(sys.argv) > 1 else "workspace"
recipe = Recipe.load("accelerator-int8", [f"workspace.path={workspace}"])
result = compile_recipe(recipe)  # raises GateError where the artifact does not compute the model
print(f"{result.path}: parity {'passed' if result.parity and result.parity.passed else 'not run'}")

engine = open_engine(result.path)
stats = GenerationStats()
print("Return the", end="")
for piece in engine.stream("Return the", max_new_tokens=24, stop=["\n\n"], stats=stats):
    print(piece, end="", flush=True)
print(f"\n{len(stats.tokens)} tokens at {stats.tokens_per_second:.0f} tokens/s; ended by {stats.finish}")
