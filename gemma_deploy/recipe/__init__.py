"""What the user asks for: the recipe schema, its refusals, and what this version builds of it.

Reads a file and checks it; what comes out for the rest of the program is a `BuildSpec`. Never imports torch.
"""

from gemma_deploy.recipe.built import check_built
from gemma_deploy.recipe.recipe import Recipe
from gemma_deploy.recipe.rules import check_against_model

__all__ = ["Recipe", "check_against_model", "check_built"]
