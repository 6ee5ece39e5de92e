"""Several adapters complete a prompt side by side: the rows of one batch, each routed to its own adapter."""
