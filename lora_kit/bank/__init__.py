"""AdapterBank: the adapters of one model, beside it as an optimizer is. It knows names and slots; layers do not."""

from lora_kit.bank.attaching import attach
from lora_kit.bank.bank import AdapterBank
from lora_kit.fold import Retention

__all__ = ["AdapterBank", "Retention", "attach"]
