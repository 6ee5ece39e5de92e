"""A tiny model of a class of transformers, and inputs for it, from its config alone: nothing is known of the family."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

HIDDEN, LAYERS, HEADS, VOCABULARY, POSITIONS, IMAGE, PATCH = 32, 2, 4, 96, 64, 32, 8
MAX_PARAMETERS: Final = 20_000_000

_SIZES: Final[dict[str, int]] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "d_embed", "encoder_hidden_size", "projection_dim",
         "decoder_hidden_size", "embedding_size", "hidden_dim", "word_embed_proj_dim", "lru_width"), HIDDEN
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "d_inner", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim",
         "ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size",
         "expert_ffn_hidden_size", "feed_forward_size"), 64
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
         "num_encoder_layers", "num_decoder_layers", "depth", "num_block_layers"), LAYERS
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
         "num_encoder_attention_heads", "num_decoder_attention_heads"), HEADS
    ),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "kv_channels", "attention_head_dim"), HIDDEN // HEADS),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), POSITIONS
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    "image_size": IMAGE, "patch_size": PATCH, "num_queries": 8, "num_mel_bins": 8, "first_k_dense_replace": 1,
    "rotary_dim": 4,
}  # fmt: skip
_KEY_VALUE_HEADS: Final = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
_DEPTHS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")


def iterate_tiny_models(kind: Any) -> Iterator[Any]:
    """Yield tiny models of a class to try, always with the same weights, smaller ones first.

    Raises:
        Exception: what its configs or its constructor raised, where there is no model at all.
    """
    problems, count = [], 0
    for make in (lambda: _shrink_by_constructor(kind), lambda: _set_all(kind.config_class()), kind.config_class):
        try:
            model = _build(kind, make())
        except Exception as error:
            problems.append(error)
        else:
            count += 1
            yield model
    if not count:
        raise problems[0]


def _shrink_by_constructor(kind: Any) -> Any:
    return kind.config_class(**_shrink(kind.config_class()))


def _build(kind: Any, config: Any) -> Any:
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"its shrunken config still has {size:,} parameters")
    torch.manual_seed(0)
    return kind(config).float()


def _shrink(config: Any) -> dict[str, Any]:
    """Return arguments for the config's class: known sizes made small, lists of layers cut, parts likewise."""
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    depth = next((values[name] for name in _DEPTHS if isinstance(values.get(name), int)), 0)
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("head_dim", *_KEY_VALUE_HEADS) and "qk_rope_head_dim" in values:
            continue  # the sizes of latent attention belong together
        if name in _DEPTHS and "depths" in values:
            continue  # the number of stages, of which each has a depth
        if hasattr(value, "to_dict"):
            changes[name] = type(value)(**_shrink(value))
        elif (small := _shrink_value(name, value, depth)) is not None:
            changes[name] = small
    return changes


def _shrink_value(name: str, value: object, depth: int) -> object:
    """Return the small value of a field; None where it stays."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int):
        if name in _KEY_VALUE_HEADS:
            return min(value, 2)
        if name.endswith("token_id") and value >= VOCABULARY:
            return 3
        return min(value, _SIZES[name]) if name in _SIZES else None
    if isinstance(value, (list, tuple)) and value:
        if name in ("hidden_sizes", "embed_dims", "dims") and isinstance(value[0], int):
            return [HIDDEN * 2**index for index in range(len(value))]
        if name in ("depths", "num_blocks") and isinstance(value[0], int):
            return [1] * len(value)
        if depth > LAYERS and len(value) == depth:
            return list(value[:1]) + list(value[-1:])
        if name in ("image_size", "patch_size") and isinstance(value[0], int):
            return [_SIZES[name]] * len(value)
    return None


def _set_all(config: Any) -> Any:
    for name, value in _shrink(config).items():
        setattr(config, name, value)
    return config


def iterate_inputs(model: Any) -> Iterator[dict[str, Any]]:
    """Yield inputs to try, the likeliest first: what forward has arguments for."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    yield from ({**inputs, **options} for inputs in _iterate_tensors(model) if inputs)


def _iterate_tensors(model: Any) -> Iterator[dict[str, Tensor]]:
    arguments, config = inspect.signature(model.forward).parameters, model.config
    own = {name: value for name, value in _make_tensors(config).items() if name in arguments}
    main = getattr(model, "main_input_name", "input_ids")
    decoder = {name: own[name] for name in ("decoder_input_ids",) if name in own}
    text = {name: own[name] for name in ("input_ids",) if name in own}
    if main in own:
        yield {main: own[main], **decoder}
    yield text
    yield {**text, **{name: own[name] for name in ("pixel_values", "input_features", "input_values") if name in own}}
    yield own
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, dict):
        yield dummy


def _make_tensors(config: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, VOCABULARY - 1, (2, 8), generator=generator)
    image = _find_value(config, "image_size") or IMAGE
    height, width = image if isinstance(image, (list, tuple)) else (image, image)
    channels, mels = _find_value(config, "num_channels") or 3, _find_value(config, "num_mel_bins") or 80
    frames = 2 * (_find_value(config, "max_source_positions") or 32)
    return {
        "input_ids": ids,
        "decoder_input_ids": ids[:, :5],
        "attention_mask": torch.ones_like(ids),
        "bbox": torch.zeros(2, 8, 4, dtype=torch.long),
        "pixel_values": torch.randn(2, channels, height, width, generator=generator),
        "input_features": torch.randn(2, mels, frames, generator=generator),
        "input_values": torch.randn(2, 8000, generator=generator),
    }


def _find_value(config: Any, name: str) -> Any:
    """Return a value of a config, or of a part of it."""
    parts = [value for value in vars(config).values() if hasattr(value, "to_dict")]
    return next((value for each in (config, *parts) if (value := getattr(each, name, None))), None)
