"""From a live PeftModel to a bank and back: the same parameters, in layers of this package."""
