"""Folding an adapter into its base: refused early, verified from what was written, all or nothing."""
