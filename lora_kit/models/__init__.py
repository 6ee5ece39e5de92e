"""The table of tasks, and bases: how they are found and loaded, their heads, and texts as tokens."""
