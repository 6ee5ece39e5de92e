"""AdapterBank: the adapters of one model, beside it as an optimizer is. It knows names and slots; layers know slots."""
