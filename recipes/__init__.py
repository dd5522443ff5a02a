"""Complete runs, no logic: a recipe is a zero-argument function that returns a RunConfig. `python -m recipes.run --list` names them."""
