"""The demo: three tasks made by code, three adapters on `kit-base`, and what one can do with them."""
