"""The weight files of a base, and the model that transformers builds from them."""
