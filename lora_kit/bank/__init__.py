"""AdapterBank: the adapters of one model, beside it as an optimizer is. It knows names and slots; layers do not."""

from lora_kit.bank.bank import AdapterBank, attach

__all__ = ["AdapterBank", "attach"]
