"""Training from a recipe: `train(recipe)` writes an adapter folder and reports what it did."""
