"""Add an adapter to an encoder and save it: `add_with_sentence_transformers.py BASE OUT lora|rslora`."""

import sys

import peft
import sentence_transformers
import torch

base, out, kind = sys.argv[1:]
torch.manual_seed(3)
model = sentence_transformers.SentenceTransformer(base, device="cpu")
config = peft.LoraConfig(
    r=4, lora_alpha=32, target_modules=["query", "value"], init_lora_weights=False, use_rslora=kind == "rslora"
)
model.add_adapter(config)
model.save_pretrained(out)
