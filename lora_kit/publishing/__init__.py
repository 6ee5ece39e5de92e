"""Adapters and models on the hub: what is sent, with which card, and how."""
