"""Small configs of a class of transformers, from its default config alone: nothing is known of the family.

There is no one way to shrink every config, since sizes depend on each other. Several are tried, the smallest first:

- *named*: fields with well-known names get well-known small values;
- *divided*: every width and every number of heads is divided by one number, so that their ratios stay;
- *divided alike*: the same number for a config and its parts;
- *shallow*: widths stay; depth, vocabulary and experts are cut.

In all of them there are few layers, one for each kind of layer that the config lists.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

HIDDEN, LAYERS, HEADS, VOCABULARY, POSITIONS, IMAGE, PATCH = 32, 2, 4, 96, 64, 32, 8
_AXES: Final = (2, 4)
"""Their product is the length of the texts that the models are given: Reformer trains on no other."""
_MAX_KINDS: Final = 4
"""Layers of so many kinds are kept."""
_WIDTHS: Final[dict[str, int]] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "d_embed", "encoder_hidden_size",
         "projection_dim", "decoder_hidden_size", "embedding_size", "hidden_dim", "word_embed_proj_dim", "lru_width",
         "text_hidden_size", "projector_hidden_size", "d_latents"), HIDDEN
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "d_inner", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim",
         "ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size", "mlp_dim",
         "expert_ffn_hidden_size", "feed_forward_size"), 64
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
         "num_encoder_attention_heads", "num_decoder_attention_heads", "num_self_attention_heads",
         "num_cross_attention_heads"), HEADS
    ),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "kv_channels", "attention_head_dim"), HIDDEN // HEADS),
    "image_size": IMAGE, "patch_size": PATCH, "num_mel_bins": 8, "rotary_dim": 4, "upsample_groups": HIDDEN,
}  # fmt: skip
_COUNTS: Final[dict[str, int]] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "vocab_size_per_codebook"), VOCABULARY),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), POSITIONS
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_expert_group", "n_groups", "mamba_n_groups"), 1),
    "encoder_hash_byte_group_vocab": VOCABULARY,
    **dict.fromkeys(("mamba_chunk_size", "max_window_layers"), 8),
    "max_length": POSITIONS,
    "num_queries": 8, "num_self_attends_per_block": 1, "first_k_dense_replace": 1, "num_kv_shared_layers": 0,
}  # fmt: skip
_KEY_VALUE_HEADS: Final = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "n_head_kv")
_DEPTHS: Final = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_encoder_layers",
    "num_decoder_layers", "depth", "num_block_layers", "layers", "num_res_blocks", "num_blocks",
    "decoder_num_hidden_layers", "encoder_num_hidden_layers",
)  # fmt: skip
_MAIN_DEPTHS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "depth")
_MAIN_HEADS: Final = ("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads", "d_state")
_IS_WIDTH: Final = re.compile(
    "hidden|intermediate|d_model|embd|embed|emb_dim|ffn|d_ff|mlp_dim|inner|width|projection|proj_|out_dim|output_dim|"
    "dim$|conv_dim|tdnn_dim|units|filters|heads|n_head|d_inner|out_channels|base_channels|mid_channels|out_channel|"
    "lru_width|expand_dim|text_config_dim|fpn_dim|feature_sizes|neck|decoder_channels|upsample_initial_channel|upsample_groups"
)
_IS_NO_WIDTH: Final = re.compile(
    "head_dim|d_kv|vocab|image|patch_size|kernel|window|stride|layers|num_embeddings|position|ratio|rope|dropout|act|"
    "prob|state|kv_lora|q_lora|index_|_per_tok|chunk|mel|input_dim|time_step|num_groups|num_channels|expand$|type|"
    "blocks|depth|block_configs"
)

_FILLED: Final[dict[str, Any]] = {
    "layer_types": ["full_attention"] * LAYERS, "mlp_layer_types": ["dense", "sparse"],
    "sliding_window": 4, "partial_rotary_factor": 1.0, "hidden_act": "silu", "prediction_length": 4,
    "context_length": 8, "default_language": "en_XX", "ffn_hidden_size": 64, "image_token_index": 3,
    "image_token_id": 3, "vocabulary_map": {"<image>": 3}, "deepstack_layer_map": [],
    "mask_token_id": 3, "token_budget": 8, "compress_ratio": 4,
}  # fmt: skip
"""Values for fields that are None by default, of which a model may need one."""
_LINKED: Final = re.compile("^(out_hidden_size|text_hidden_size|output_dim|llm_hidden_size|output_hidden_size|out_dim)")
"""Fields of a part that have the width of another part."""

Shrink = Callable[[Mapping[str, Any]], dict[str, Any]]
"""From the fields of a config to the small values of some of them."""


def iterate_configs(kind: Any) -> Iterator[Callable[[], Any]]:
    """Yield makers of configs for a model class, of smaller models first; the default config is the last."""
    for shrink in (_name_widths, _divide_widths, _keep_widths):
        yield lambda shrink=shrink: _rebuild(kind.config_class(), shrink)
        yield lambda shrink=shrink: _assign(kind.config_class(), shrink)
    yield lambda: _rebuild(kind.config_class(), _make_divider(_common_divisor(kind.config_class())))
    yield kind.config_class
    for shrink in (_name_widths, _keep_widths):
        yield lambda shrink=shrink: _rebuild(kind.config_class(), lambda values: shrink(values) | _fill(values))
        yield lambda shrink=shrink: _assign(kind.config_class(), lambda values: shrink(values) | _fill(values))


def iterate_parts(config: Any) -> Iterator[Any]:
    """Yield the configs inside a config, and inside those."""
    for value in _fields_of(config).values():
        if hasattr(value, "to_dict"):
            yield value
            yield from iterate_parts(value)


def _rebuild(config: Any, shrink: Shrink) -> Any:
    """Return a config of the same class, made anew from the small values, so that it derives others from them."""
    return type(config)(**_shrink_parts(config, shrink, _rebuild))


def _assign(config: Any, shrink: Shrink) -> Any:
    """Return the config with the small values put in: what it derived from others stays."""
    for name, value in _shrink_parts(config, shrink, _assign).items():
        setattr(config, name, value)
    return config


def _shrink_parts(config: Any, shrink: Shrink, make: Callable[[Any, Shrink], Any]) -> dict[str, Any]:
    values = _fields_of(config)
    changes = _cut_depth(values) | shrink(values)
    parts = _parts_of(config)
    widths = {_hidden_of(part): name for name, part in parts.items() if _hidden_of(part)}
    changes |= {name: make(part, shrink) for name, part in parts.items()}
    for part, name, width in ((p, n, v) for p in parts for n, v in _fields_of(parts[p]).items() if _LINKED.match(n)):
        if width in widths and widths[width] != part and _is_count(width):
            setattr(changes[part], name, _hidden_of(changes[widths[width]]))
    return changes


def _hidden_of(config: Any) -> int:
    return next((v for n in ("hidden_size", "d_model", "n_embd") if _is_count(v := getattr(config, n, None))), 0)


def _fields_of(config: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if not name.startswith("_")}


def _parts_of(config: Any) -> dict[str, Any]:
    """Return the configs inside a config; one that is missing by default is made, where its class is known."""
    parts = {name: copy.deepcopy(v) for name, v in _fields_of(config).items() if hasattr(v, "to_dict")}
    for name, kind in getattr(config, "sub_configs", {}).items():
        if getattr(config, name, None) is None and hasattr(kind, "to_dict"):
            parts[name] = kind()
    return parts


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _cut_depth(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return fewer layers, entries, positions and experts; widths stay."""
    depth = next((values[name] for name in _MAIN_DEPTHS if _is_count(values.get(name))), 0)
    lists = {name: list(v) for name, v in values.items() if _is_per_layer(v, depth)} if depth > LAYERS else {}
    kept = _choose_layers(list(lists.values()), depth)
    changes: dict[str, Any] = {name: [value[index] for index in kept] for name, value in lists.items()}
    for name, value in values.items():
        small = _cut(name, value, depth=len(kept), staged="depths" in values)
        if small is not None and name not in lists:
            changes[name] = small
    return changes


def _is_per_layer(value: object, depth: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == depth


def _choose_layers(lists: list[list[Any]], depth: int) -> list[int]:
    """Return the indices of the layers to keep: of each kind the first, and at least two."""
    kinds = [repr([each[index] for each in lists]) for index in range(depth)]
    first = [index for index in range(depth) if kinds[index] not in kinds[:index]][:_MAX_KINDS]
    return first if len(first) >= LAYERS else sorted({0, max(depth - 1, 1)})


def _cut(name: str, value: Any, *, depth: int, staged: bool) -> object:
    """Return the small value of a field; None where it stays."""
    if _is_count(value):
        if name in _DEPTHS:
            # Of a model in stages this is their number, and each has a depth.
            return None if staged else min(value, depth)
        if name.endswith(("token_id", "token_index")) and value >= VOCABULARY:
            return 3
        if name.endswith("vocab_size"):
            return min(value, VOCABULARY)
        return min(value, _COUNTS[name]) if name in _COUNTS else None
    if isinstance(value, (list, tuple)) and value and all(map(_is_count, value)):
        if name == "axial_pos_shape":
            return list(_AXES)
        if name in ("depths", "num_blocks", "stage_numb_of_layers", "stage_num_blocks", "encoder_depths"):
            return [1] * len(value)
        if name.endswith(("token_id", "token_index")) and max(value) >= VOCABULARY:
            return 3
        if re.search("index|look_|layer_ids|global_attention_blocks", name) and max(value) >= depth:
            return [index for index in value if index < depth] or [depth - 1]
    return None


def _keep_widths(_: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _name_widths(values: Mapping[str, Any]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("head_dim", *_KEY_VALUE_HEADS) and "qk_rope_head_dim" in values:
            continue  # the sizes of latent attention belong together
        if name == "rope_parameters" and isinstance(value, dict) and "mrope_section" in value:
            changes[name] = value | {"mrope_section": _divide_sections(values, value)}
        if _is_count(value) and name in _KEY_VALUE_HEADS:
            changes[name] = min(value, 2)
        elif _is_count(value) and name in _WIDTHS:
            changes[name] = min(value, _WIDTHS[name])
        elif isinstance(value, (list, tuple)) and value and _is_count(value[0]):
            if name in ("hidden_sizes", "embed_dims", "dims"):
                changes[name] = [HIDDEN * 2**index for index in range(len(value))]
            elif name in ("image_size", "patch_size"):
                changes[name] = [_WIDTHS[name]] * len(value)
    return changes


def _divide_sections(values: Mapping[str, Any], rope: Mapping[str, Any]) -> list[int]:
    """Return how many frequencies of a small head are for time, height and width."""
    rotated = int(HIDDEN // HEADS * (rope.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1))
    count = len(rope["mrope_section"])
    return [rotated // 2 - (count - 1) * (rotated // 2 // count)] + [rotated // 2 // count] * (count - 1)


def _fill(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values for fields that are None."""
    missing = {name for name, value in values.items() if value is None}
    sizes = _WIDTHS | _COUNTS | dict.fromkeys(_KEY_VALUE_HEADS, 2) | _FILLED
    kept = missing - {"q_lora_rank", "embedding_size", "d_inner", "n_inner", "image_size", "dim"}
    changes = {name: sizes[name] for name in kept if name in sizes}
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope and "mrope_section" not in rope:
        changes["rope_parameters"] = rope | {
            "mrope_section": _divide_sections(values, rope | {"mrope_section": [0] * 3})
        }
    return changes


def _divide_widths(values: Mapping[str, Any]) -> dict[str, Any]:
    return _make_divider(_divisor_of(values))(values)


def _divisor_of(values: Mapping[str, Any]) -> int:
    """Return the largest number that divides the attention heads into two or more; 8 where there are none."""
    heads = next((values[name] for name in _MAIN_HEADS if _is_count(values.get(name))), 16)
    return max(divisor for divisor in range(1, max(heads // 2, 1) + 1) if heads % divisor == 0)


def _common_divisor(config: Any) -> int:
    parts = _parts_of(config).values()
    return math.gcd(*(_divisor_of(_fields_of(each)) for each in (config, *parts)))


def _make_divider(divisor: int) -> Shrink:
    def divide(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(divide(each) for each in value)
        if not _is_count(value) or value < 2 * divisor:
            return value
        # Where it leaves a remainder nothing else depends on it, except what wants a multiple of a power of two.
        return value // divisor if value % divisor == 0 else max(value // divisor // 8, 1) * 8

    def shrink(values: Mapping[str, Any]) -> dict[str, Any]:
        changes = {n: divide(v) for n, v in values.items() if _IS_WIDTH.search(n) and not _IS_NO_WIDTH.search(n)}
        fewer = {n: max(1, values[n] // divisor) for n in _KEY_VALUE_HEADS if _is_count(values.get(n))}
        return {name: value for name, value in (changes | fewer).items() if value != values[name]}

    return shrink
