"""Finding settings: many runs, each attacked, and what none of the others beats."""
