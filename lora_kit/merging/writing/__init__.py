"""The merged weights on their way to the disk."""
