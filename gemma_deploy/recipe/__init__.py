"""What the user asks for: the recipe schema, its refusals, and what this version builds of it.

First step of the data path; imports nothing of gemma_deploy but `errors`, and never torch.
"""

from gemma_deploy.recipe.built import check_built
from gemma_deploy.recipe.recipe import Recipe
from gemma_deploy.recipe.rules import check_against_model
from gemma_deploy.recipe.sections import QUANTIZE_TYPES

__all__ = ["QUANTIZE_TYPES", "Recipe", "check_against_model", "check_built"]
