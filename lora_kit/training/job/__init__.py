"""A recipe with everything it names: rows, base, method."""
