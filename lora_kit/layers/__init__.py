"""Wrappers around one frozen base layer each. They know slots and routing; names, configs and files are the bank's.

A layer keeps, for everything an adapter may bring to it, a *slab*: one tensor whose first axis is the slot. Slot 0 is
"no adapter" and every slot holds neutral values until an adapter is put there, so any slot may be routed to any layer.
"""

from lora_kit.layers.adopted import (
    AdoptedConvolution,
    AdoptedEmbedding,
    AdoptedLinear,
    AdoptedModule,
    AdoptedParameter,
    AdoptingLayer,
)
from lora_kit.layers.alone import AloneLayer, LoraConvolution, LoraParameter, is_transposed
from lora_kit.layers.experts import own_parameters
from lora_kit.layers.kinds import (
    features_of,
    has_numbers,
    holds_codes,
    initialise,
    innermost,
    is_packed,
    is_quantised,
    keeps_transposed,
    kind_of,
    pause_packing,
    resume_packing,
)
from lora_kit.layers.pairs import LoraEmbedding, LoraExpert, LoraLinear, wrap
from lora_kit.layers.routing import BASE, Routing
from lora_kit.layers.saved import SavedModule
from lora_kit.layers.slots import SlotLayer
from lora_kit.layers.starts import MAGNITUDE, START_A, START_B, A, B, Starts, pair_of
from lora_kit.layers.tokens import INDICES, ROWS, TiedTokens, TokenTable, table_size, unfit_for_tokens

__all__ = [
    "BASE",
    "INDICES",
    "MAGNITUDE",
    "ROWS",
    "START_A",
    "START_B",
    "A",
    "AdoptedConvolution",
    "AdoptedEmbedding",
    "AdoptedLinear",
    "AdoptedModule",
    "AdoptedParameter",
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
    "Starts",
    "TiedTokens",
    "TokenTable",
    "features_of",
    "has_numbers",
    "holds_codes",
    "initialise",
    "innermost",
    "is_packed",
    "is_quantised",
    "is_transposed",
    "keeps_transposed",
    "kind_of",
    "own_parameters",
    "pair_of",
    "pause_packing",
    "resume_packing",
    "table_size",
    "unfit_for_tokens",
    "wrap",
]
