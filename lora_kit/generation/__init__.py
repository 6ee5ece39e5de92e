"""Several adapters answer, side by side: the rows of one batch, each routed to its own adapter."""
