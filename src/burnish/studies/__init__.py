"""Arms of a recipe over several seeds: how they run, and what is told of them."""
