"""Serve many adapters of one base: an engine, the names of adapters, an HTTP API, a page, a chat."""
