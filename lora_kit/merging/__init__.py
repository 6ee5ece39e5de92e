"""Folding an adapter into its base: checked in advance, verified from what was written, all or nothing."""
