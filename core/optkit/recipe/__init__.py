"""The recipe: what a user writes, bound to the plugins that it names.

A relative path inside a recipe is relative to the current directory, as on a command line, not to the recipe's file.
"""

from optkit.recipe.binding import CalibrationData, Evaluation, Recipe, Use, bind_recipe, load_recipe
from optkit.recipe.keys import Benchmark, CalibrationKeys, EvaluationKeys, Gate, Limit, RecipeKeys
from optkit.recipe.schema import recipe_schema

__all__ = [
    "Benchmark",
    "CalibrationData",
    "CalibrationKeys",
    "Evaluation",
    "EvaluationKeys",
    "Gate",
    "Limit",
    "Recipe",
    "RecipeKeys",
    "Use",
    "bind_recipe",
    "load_recipe",
    "recipe_schema",
]
