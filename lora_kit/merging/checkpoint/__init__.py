"""The files of a base: their tensors, and what transformers makes of them."""
