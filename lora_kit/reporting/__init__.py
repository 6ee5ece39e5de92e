"""Pages of results: one style for trainings, evaluations, sweeps and comparisons, and their plots."""
