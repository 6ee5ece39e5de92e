"""Many trainings that differ in some keys of one recipe, and the best of them kept."""
