"""From a live PeftModel to a bank and back: the same parameters, with layers of ours around them."""
