"""Wrappers around one frozen base layer each. They know slots and routing; names, configs and files are the bank's.

A layer keeps, for everything an adapter may bring to it, a *slab*: one tensor whose first axis is the slot. Slot 0 is
"no adapter" and every slot holds neutral values until an adapter is put there, so any slot may be routed to any layer.
"""

from lora_kit.layers.adopted import AdoptedEmbedding, AdoptedLinear, AdoptedModule, AdoptingLayer
from lora_kit.layers.alone import AloneLayer, LoraConvolution, LoraParameter, is_transposed
from lora_kit.layers.kinds import (
    features_of,
    initialise,
    is_packed,
    keeps_transposed,
    kind_of,
    pause_packing,
    resume_packing,
)
from lora_kit.layers.pairs import MAGNITUDE, A, B, LoraEmbedding, LoraExpert, LoraLinear, wrap
from lora_kit.layers.routing import BASE, Routing
from lora_kit.layers.saved import SavedModule
from lora_kit.layers.slots import SlotLayer

__all__ = [
    "BASE",
    "MAGNITUDE",
    "A",
    "AdoptedEmbedding",
    "AdoptedLinear",
    "AdoptedModule",
    "AdoptingLayer",
    "AloneLayer",
    "B",
    "LoraConvolution",
    "LoraEmbedding",
    "LoraExpert",
    "LoraLinear",
    "LoraParameter",
    "Routing",
    "SavedModule",
    "SlotLayer",
    "features_of",
    "initialise",
    "is_packed",
    "is_transposed",
    "keeps_transposed",
    "kind_of",
    "pause_packing",
    "resume_packing",
    "wrap",
]
