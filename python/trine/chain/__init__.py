"""Several techniques after each other on one model, as a recipe says: `trine compress`."""

from trine.chain.job import run
from trine.chain.recipe_file import ChainJob

__all__ = ["ChainJob", "run"]
