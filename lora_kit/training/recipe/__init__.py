"""The recipe: its keys, how it is read, and how its values are checked."""
