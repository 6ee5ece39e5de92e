"""Inputs for a model that nothing is known of, from the arguments of its forward and the sizes in its config.

What is missing is learned from what the model says: an error that names arguments has them added.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from tools.scan_models.shrink_config import IMAGE, VOCABULARY, iterate_parts

BATCH, TOKENS, VARIANTS = 2, 8, 3
_MAIN_INPUTS: Final = (
    "input_ids", "pixel_values", "input_features", "input_values", "inputs_embeds", "past_values",
    "pixel_values_videos", "audio_values", "flattened_patches", "hidden_states", "inputs", "sample", "states",
    "decoder_input_ids", "encoder_hidden_states", "spectrogram", "image_embeds", "input_audio",
)  # fmt: skip
_FLAGS: Final = {"use_cache": False, "return_loss": False}
_MAX_REPAIRS: Final = 6
_MAX_CANDIDATES: Final = 60

Inputs = dict[str, Any]


def find_inputs(model: Any, reason_not_usable: Callable[[Inputs], str]) -> tuple[Inputs | None, str]:
    """Return inputs that a model accepts, or None; and of the likeliest that were tried why it does not.

    Args:
        reason_not_usable: of inputs; empty where the model accepts them.
    """
    names, reasons = set(inspect.signature(model.forward).parameters), list[str]()
    if "input_ids" in names:
        names.discard("inputs_embeds")  # the same in other words; both together are refused
    flags = {name: value for name, value in _FLAGS.items() if name in names}
    for index, maker in enumerate(_iterate_makers(model.config, names)):
        for start in _iterate_starts(model, names):
            inputs, reason = _repair(maker, start, names, flags, reason_not_usable)
            if inputs is not None:
                return inputs, ""
            reasons += [reason] if reason else []
        if index and len(reasons) > _MAX_CANDIDATES:
            break
    return None, reasons[0] if reasons else "no argument of its forward is known"


def _repair(
    maker: InputMaker, names: Sequence[str], known: set[str], flags: Inputs, reason_not_usable: Callable[[Inputs], str]
) -> tuple[Inputs | None, str]:
    """Return inputs of these names, and of those for which the model then asks."""
    inputs: Inputs = {name: value for name in names if (value := maker.make(name)) is not None}
    reason = ""
    for _ in range(_MAX_REPAIRS if inputs else 0):
        last, reason = reason, reason_not_usable({**inputs, **flags})
        if not reason:
            return {**inputs, **flags}, ""
        asked = [name for name in re.findall(r"[a-z][a-z0-9_]+", reason) if name in known and name not in inputs]
        made = {name: value for name in asked if (value := maker.make(name)) is not None}
        if not made or reason == last:
            break
        inputs |= made
    return None, reason


def _iterate_starts(model: Any, known: set[str]) -> Iterator[tuple[str, ...]]:
    """Yield names of arguments to begin with, the likeliest first."""
    parameters = inspect.signature(model.forward).parameters.values()
    required = tuple(p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)
    main = getattr(model, "main_input_name", "input_ids")
    decoder = tuple(name for name in ("decoder_input_ids",) if name in known)
    text = tuple(name for name in ("input_ids",) if name in known)
    starts = [
        ((main,) if main in known else ()) + required + decoder,
        text + required,
        *((name, *required) for name in _MAIN_INPUTS if name in known),
        *((*text, name, *decoder) for name in _MAIN_INPUTS if name in known),
        tuple(name for name in _MAIN_INPUTS if name in known),
    ]
    yield from dict.fromkeys(tuple(dict.fromkeys(start)) for start in starts if start)


def _iterate_makers(config: Any, names: set[str]) -> Iterator[InputMaker]:
    """Yield makers of inputs of different shapes: images by the config, small, large; and all variants of shapes."""
    image = _find_value(config, "image_size", "img_size", "input_size", "crop_size") or IMAGE
    own = (image[0], image[-1]) if isinstance(image, (list, tuple)) else (image, image)
    small, large = (64, 64), (224, 224)
    for height, width in dict.fromkeys((own, small, large) if max(own) <= large[0] else (small, large, own)):
        for variant in range(VARIANTS):
            yield InputMaker(config, names, height, width, variant)


class InputMaker:
    """Makes one input of a name, with the shape that the config suggests.

    Attributes:
        config: of the model.
        names: of the arguments of its forward.
        height: of images.
        width: of images.
        variant: 0 for the usual shapes. 1: sounds have their time first, waves a channel, images are videos, and tokens
            have choices, or codebooks. 2: sounds have a channel, and the batch has a row for each codebook.
    """

    def __init__(self, config: Any, names: set[str], height: int, width: int, variant: int) -> None:
        self.config = config
        self.names = names
        self.height = height
        self.width = width
        self.variant = variant

    def make(self, name: str) -> Any:
        """Return a tensor for an argument, the same each time; None where nothing is known of the name."""
        make = _MAKERS.get(name)
        self._generator = torch.Generator().manual_seed(1)
        return None if make is None else make(self)

    def find(self, default: int, *names: str) -> int:
        """Return the first of these sizes that a config has, or a part of it."""
        found = _find_value(self.config, *names)
        found = found[0] if isinstance(found, (list, tuple)) else found
        return found if isinstance(found, int) else default

    def draw(self, *shape: int) -> Tensor:
        """Return normal numbers."""
        return torch.randn(BATCH, *shape, generator=self._generator)

    def draw_ids(self) -> Tensor:
        """Return tokens (n, tokens), none of them special but the last, which is the end; or with choices."""
        vocabulary = max(min(self.find(VOCABULARY, "vocab_size", "codebook_size"), VOCABULARY), 6)
        codebooks = self.find(0, "num_codebooks")
        other = (BATCH, TOKENS, codebooks) if codebooks else (BATCH, 2, TOKENS)
        shape = ((BATCH, TOKENS), other, (BATCH * max(codebooks, 1), TOKENS))[self.variant]
        ids = torch.randint(4, vocabulary - 1, shape, generator=self._generator)
        end = self.find(0, "eos_token_id")
        if end and end < vocabulary:
            ids[..., -1] = end
        return ids

    @property
    def channels(self) -> int:
        """Return how many channels an image has."""
        return self.find(3, "num_channels", "in_channels", "in_chans")

    @property
    def hidden(self) -> int:
        """Return the width of hidden states."""
        return self.find(32, "hidden_size", "d_model", "n_embd", "embed_dim", "dim")

    def make_image(self) -> Tensor:
        """Return images (n, channels, height, width), or videos; patches where their grid is an argument."""
        if self.names & {"grid_thw", "image_grid_thw"} and not self.variant:
            return self.make_packed_patches()
        if self.variant == 1:
            return self.make_video()
        return self.draw(self.channels, self.height, self.width)

    def make_video(self) -> Tensor:
        """Return videos (n, frames, channels, height, width)."""
        return self.draw(self.find(2, "num_frames"), self.channels, self.height, self.width)

    def make_sound(self) -> Tensor:
        """Return features of sounds, (n, mels, frames) or (n, frames, mels)."""
        mels = self.find(80, "num_mel_bins", "input_feat_per_channel", "feature_size", "n_mels", "mel_dim",
                         "feature_projection_input_dim", "input_dim")  # fmt: skip
        if self.variant == 0:
            return self.draw(mels, self.frames)
        frames = self.find(64, "max_length")
        return self.draw(frames, mels) if self.variant == 1 else self.draw(1, frames, mels)

    @property
    def frames(self) -> int:
        """Return how many frames a sound has."""
        return 2 * self.find(32, "max_source_positions")

    def make_wave(self) -> Tensor:
        """Return sounds (n, samples) or (n, 1, samples)."""
        if _find_value(self.config, "num_mel_bins") and not _find_value(self.config, "conv_dim"):
            return self.make_sound()
        return self.draw(self.find(1, "audio_channels"), 7680) if self.variant else self.draw(7680)

    def make_series(self) -> Tensor:
        """Return series (n, times), or (n, times, channels)."""
        lags = _find_value(self.config, "lags_sequence") or [0]
        times = self.find(32, "context_length", "prediction_length", "seq_length") + max(lags)
        channels = self.find(1, "num_input_channels", "input_size")
        return self.draw(times, channels) if self.variant or channels > 1 else self.draw(times)

    def make_patches(self) -> Tensor:
        """Return patches with their row and column, (n, patches, 2 + channels · side²)."""
        size = self.channels * self.find(16, "patch_size") ** 2
        places = torch.arange(4).expand(BATCH, 4)
        return torch.cat([torch.stack([places, places], -1).float(), self.draw(4, size)], -1)

    def make_packed_patches(self) -> Tensor:
        """Return the patches of all images in one list, (patches, channels · frames · side²)."""
        side, frames = self.find(14, "patch_size"), self.find(1, "temporal_patch_size")
        return self.draw(16, self.channels * frames * side**2).flatten(0, 1)


_MAKERS: Final[dict[str, Callable[[InputMaker], Any]]] = {
    **dict.fromkeys(("input_ids", "decoder_input_ids", "qformer_input_ids", "text_input_ids"), lambda m: m.draw_ids()),
    **dict.fromkeys(
        ("attention_mask", "qformer_attention_mask", "decoder_attention_mask", "text_attention_mask"),
        lambda m: torch.ones(BATCH, TOKENS, dtype=torch.long),
    ),
    **dict.fromkeys(
        ("token_type_ids", "mm_token_type_ids", "reduced_token_type_ids"),
        lambda m: torch.zeros(BATCH, TOKENS, dtype=torch.long),
    ),
    **dict.fromkeys(("inputs_embeds", "embeddings"), lambda m: m.draw(TOKENS, m.hidden)),
    "hidden_states": lambda m: m.make_image() if "grid_thw" in m.names else m.draw(TOKENS, m.hidden),
    **dict.fromkeys(
        ("input_features_mask", "feature_attention_mask", "mask", "padding_mask"),
        lambda m: torch.ones(BATCH, m.frames, dtype=torch.bool),
    ),
    **dict.fromkeys(("encoder_hidden_states", "image_embeds"), lambda m: m.draw(TOKENS, m.hidden)),
    **dict.fromkeys(
        ("image_grid_thw", "grid_thw", "video_grid_thw"), lambda m: torch.tensor([[1, 4, 4]] * BATCH)
    ),
    **dict.fromkeys(("pixel_values", "conditional_pixel_values", "inputs", "sample"), lambda m: m.make_image()),
    **dict.fromkeys(("pixel_values_videos", "video_values"), lambda m: m.make_video()),
    **dict.fromkeys(("input_features", "audio_features", "spectrogram"), lambda m: m.make_sound()),
    **dict.fromkeys(("input_values", "audio_values", "input_audio"), lambda m: m.make_wave()),
    "past_values": lambda m: m.make_series(),
    "flattened_patches": lambda m: m.make_patches(),
    "bbox": lambda m: torch.zeros(BATCH, TOKENS, 4, dtype=torch.long),
    "state": lambda m: m.draw(m.find(32, "max_state_dim", "state_dim")),
    "states": lambda m: m.draw(TOKENS, m.find(17, "state_dim")),
    "actions": lambda m: m.draw(TOKENS, m.find(4, "act_dim", "max_action_dim")),
    "visual_feats": lambda m: m.draw(4, m.find(2048, "visual_feat_dim")),
    "visual_pos": lambda m: m.draw(4, m.find(4, "visual_pos_dim")),
    "visual_embeds": lambda m: m.draw(4, m.find(512, "visual_embedding_dim")),
    "past_time_features": lambda m: m.draw(m.make_series().shape[1], m.find(1, "num_time_features")),
    "past_observed_mask": lambda m: torch.ones_like(m.make_series()),
}  # fmt: skip


def _find_value(config: Any, *names: str) -> Any:
    """Return the first of these values that a config has, or a part of it."""
    configs = (config, *iterate_parts(config))
    found = (getattr(each, name, None) for name in names for each in configs)
    return next((value for value in found if value), None)
