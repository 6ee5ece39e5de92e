"""From a live PeftModel to a bank and back: the same parameters, with layers of ours around them."""

from lora_kit.bridge.adopt import AdoptedBank, adopt

__all__ = ["AdoptedBank", "adopt"]
