"""Several adapters answer, side by side: the rows of one batch, each routed to its own adapter."""

from lora_kit.generate.answers import Generation, generate
from lora_kit.generate.decoding import Sampling
from lora_kit.generate.named import BASE_ROW
from lora_kit.generate.prompts import separator_of, template_of

__all__ = ["BASE_ROW", "Generation", "Sampling", "generate", "separator_of", "template_of"]
