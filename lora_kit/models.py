"""Loading a base: a hub id, a local folder, or `kit-base`; and the one way a prompt becomes tokens.

Code that comes with a model is never run, a weight that is missing is an error, and the pad token always exists.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from lora_kit.dtypes import float_dtype
from lora_kit.errors import BaseModelError, LoraKitError, listed, nearest
from lora_kit.fingerprint import fingerprint

logger = logging.getLogger(__name__)

KIT_BASE: Final = "kit-base"
TASKS: Final = ("causal-lm", "classify", "tokens", "seq2seq")
"""Text that goes on; a label for a text; a label for each word; a text for a text, by an encoder and a decoder."""
QUANTIZATIONS: Final = ("nf4", "int8")
DEFAULT_SEPARATOR: Final = "\n"
"""What stands between a prompt and its completion, in training and in generation, unless a recipe says otherwise."""

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HEADS: Final = (
    "score",
    "classifier",
    "classification_head",
    "pre_classifier",
    "head",
    "pooler",
    "sequence_summary",
    "logits_proj",
)
"""What the modules of a classification head are called at the top of transformers' models."""
_NEW_HEADS: Final = ("classify", "tokens")
"""Tasks whose head a checkpoint need not have."""
_HEAD_SEED: Final = 0
"""A head that the checkpoint does not have is drawn from this seed, so that one base is the same base every time."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """A loaded base model with its tokenizer.

    Attributes:
        model: in evaluation mode, on its device.
        tokenizer: with a pad token.
        name: what it was asked for by: a hub id, a folder or `kit-base`.
        task: one of `TASKS`.
    """

    model: Any
    tokenizer: Any
    name: str
    task: str = "causal-lm"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def fingerprint(self) -> dict[str, Any]:
        """What tells this base from others; see `lora_kit.fingerprint`."""
        return fingerprint(self.model, name=self.name)

    @property
    def decoder_inputs(self) -> Callable[[Tensor], Tensor] | None:
        """What a decoder reads while it learns to write labels, see `decoder_inputs`; None without an encoder."""
        return functools.partial(decoder_inputs, self.model) if self.task == "seq2seq" else None

    @property
    def max_length(self) -> int:
        """Tokens the model can see at once; 2^30 where neither the model nor the tokenizer says."""
        return _max_length(self.model.config, self.tokenizer)


def load_base(
    base: str | Path,
    *,
    task: str = "causal-lm",
    num_labels: int | None = None,
    label2id: Mapping[str, int] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    quantize: str | None = None,
) -> Base:
    """A base model and its tokenizer, ready to attach adapters to.

    Args:
        base: a hub id, a local folder, or `kit-base` (which comes with the package and needs no network).
        task: `causal-lm`; `classify` for a head over the whole text, `tokens` for one over each token; `seq2seq`.
        num_labels: size of that head; needed for those two unless `label2id` is given or the checkpoint has a head.
        label2id: names of the labels to their numbers, kept in the model's config.
        dtype: `bf16`, `fp16`, `fp32` or a torch.dtype; None or `auto` for the checkpoint's own.
        device: where to put it; None for CUDA where there is one and the CPU otherwise.
        quantize: `nf4` or `int8` through bitsandbytes; None for the weights as they are.

    Raises:
        BaseModelError: nothing of that name, files that are missing or torn, or weights that do not fill the model.
        ConfigError: an unknown dtype.
    """
    _check_one_of("task", task, TASKS)
    _check_one_of("quantize", quantize, QUANTIZATIONS)
    torch_dtype = _dtype(dtype)
    place = _device(device)
    source, offline = _locate(base)
    name = str(base)
    with quiet(), _translated(name):
        config = _config(source, task=task, num_labels=num_labels, label2id=label2id, offline=offline)
        _check_architecture(name, config, task)
        tokenizer = _tokenizer(source, config, offline=offline)
        model = _model(source, config, task, dtype=torch_dtype, device=place, quantize=quantize, offline=offline)
    _ensure_pad(model, tokenizer, name, task)
    # What adapters are said to be made for: the name it was asked for by, not where the package happens to lie.
    model.config._name_or_path = name
    model.eval()
    return Base(model=model, tokenizer=tokenizer, name=name, task=task)


@dataclass(frozen=True)
class Reader:
    """How a base reads, known without its weights.

    Attributes:
        tokenizer: of the base.
        max_length: tokens it can see at once, as `Base.max_length`.
        both: whether it has an encoder and a decoder.
    """

    tokenizer: Any
    max_length: int
    both: bool


def load_reader(base: str | Path) -> Reader:
    """The tokenizer of a base and what its config says of its input.

    Raises:
        BaseModelError: nothing of that name, or no tokenizer that can be read.
    """
    source, offline = _locate(base)
    with quiet(), _translated(str(base)):
        config = _config(source, task="causal-lm", num_labels=None, label2id=None, offline=offline)
        tokenizer = _tokenizer(source, config, offline=offline)
    return Reader(tokenizer, _max_length(config, tokenizer), bool(getattr(config, "is_encoder_decoder", False)))


def _max_length(config: Any, tokenizer: Any) -> int:
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    limits.append(getattr(tokenizer, "model_max_length", None))
    return min([limit for limit in limits if isinstance(limit, int) and limit > 0] + [1 << 30])


def render_prompt(prompt: str, *, separator: str = DEFAULT_SEPARATOR) -> str:
    """The text a completion follows: the prompt and the separator. Training and generation both use exactly this."""
    return prompt + separator


def special_tokens(tokenizer: Any, *, side: Literal["text", "text_target"] = "text") -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text: a BOS and nothing, `[CLS]` and `[SEP]`, or nothing at all.

    Args:
        side: `text_target` for texts that a decoder writes, which some tokenizers treat differently.
    """
    plain = tokenizer(**{side: "a"}, add_special_tokens=False)["input_ids"]
    full = tokenizer(**{side: "a"}, add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a rendered prompt: one BOS if the tokenizer adds one (never a second), no EOS."""
    prefix, _ = special_tokens(tokenizer)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [*prefix, *without_special(ids, prefix, [])]


def source_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of what an encoder reads: the text between the tokenizer's own special tokens, none of them doubled."""
    prefix, suffix = special_tokens(tokenizer)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [*prefix, *without_special(ids, prefix, suffix), *suffix]


def without_special(ids: list[int], prefix: list[int], suffix: list[int]) -> list[int]:
    """Tokens of a text without special tokens that it brings itself, where they would be put there anyway."""
    ids = ids[len(prefix) :] if prefix and ids[: len(prefix)] == prefix else ids
    return ids[: -len(suffix)] if suffix and ids[-len(suffix) :] == suffix else ids


def decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """What a decoder reads while it learns to write these labels: int64 (rows, length), shifted right.

    Args:
        labels: int64 (rows, length), -100 where there is none.
    """
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        shifted: Tensor = own(labels)
        return shifted
    start, pad = model.config.decoder_start_token_id, model.config.pad_token_id
    return torch.nn.functional.pad(labels[:, :-1], (1, 0), value=start).masked_fill(labels == -100, pad)


def _check_one_of(name: str, value: str | None, known: Sequence[str]) -> None:
    if value is not None and value not in known:
        hint = nearest(str(value), known) or f"known: {listed(known)}"
        raise BaseModelError(f"{name} {value!r} is not known", hint=hint)


def _dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    return "auto" if dtype is None or dtype == "auto" else float_dtype(dtype)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise BaseModelError(f"device {device!r} is not known", hint="cpu, cuda or cuda:0") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise BaseModelError(f"device {device!r} was asked for, and torch sees no CUDA device", hint="use cpu")
    return place


def _locate(base: str | Path) -> tuple[str, bool]:
    """Where to read the base from (a folder or a hub id), and whether to keep off the network."""
    if base == KIT_BASE:
        return str(Path(__file__).parent / "kit_base"), True
    text, path = str(base), Path(base).expanduser()
    if path.is_dir():
        _check_folder(path)
        return str(path), True
    if path.exists():
        raise BaseModelError(f"{text} is a file", hint="a base is a folder, a hub id, or kit-base")
    # `organisation/model` on the hub looks like a path; it is one if the folder before the slash is here.
    if isinstance(base, Path) or not _HUB_ID.fullmatch(text) or ("/" in text and path.parent.is_dir()):
        raise BaseModelError(f"{text}: no such folder", hint=_near(path))
    return text, _hub_offline(text)


def _near(path: Path) -> str:
    """A hint at a folder of nearly that name."""
    parent = path.parent
    folders = [str(parent / entry.name) for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    return nearest(str(path), [*folders, KIT_BASE]) or "give a folder, a hub id, or kit-base"


def _check_folder(path: Path) -> None:
    if (path / "adapter_config.json").exists():
        raise BaseModelError(f"{path}: this folder holds an adapter, not a base", hint="give it as the adapter")
    config = path / "config.json"
    if not config.is_file():
        hint = "a base is a folder as save_pretrained writes it"
        raise BaseModelError(f"{path}: no config.json in this folder", hint=hint)
    try:
        json.loads(config.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BaseModelError(f"{config}: not JSON: {error}") from None


def _hub_offline(name: str) -> bool:
    """Whether a hub id must be read from the local cache.

    Raises:
        BaseModelError: it is neither in the cache nor to be reached, or it holds no model.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    else:
        try:
            # One request with a time limit, before anything that would try again and again.
            info = HfApi().model_info(name, timeout=10)
        except (GatedRepoError, RepositoryNotFoundError):
            told = f"{name}: the hub has no such model, or it needs a login"
            raise BaseModelError(told, hint=_near(Path(name))) from None
        except Exception as error:  # any failure of the network, of whatever library it comes from
            reason = f"the hub did not answer ({type(error).__name__})"
        else:
            files = {sibling.rfilename for sibling in info.siblings or ()}
            if "config.json" not in files:
                raise BaseModelError(f"{name}: no config.json in this repository", hint="an adapter is not a base")
            return False
    if not cached:
        close = nearest(name, [KIT_BASE])
        hint = close or "give a local folder, or kit-base, which needs no network"
        raise BaseModelError(f"{name}: no such folder here, it is not in the local cache, and {reason}", hint=hint)
    logger.info("%s: read from the local cache, since %s", name, reason)
    return True


@contextlib.contextmanager
def _translated(name: str) -> Iterator[None]:
    """What transformers and safetensors raise, as one typed line."""
    try:
        yield
    except LoraKitError:
        raise
    except MemoryError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise BaseModelError(f"{name}: this model asks to run code of its own, which is never done") from None
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BaseModelError(f"{name}: could not be read: {lines[0]}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' bars and load reports, and bitsandbytes' line about `kernels`, off the terminal."""
    from transformers.utils import logging as theirs

    bars, verbosity = theirs.is_progress_bar_enabled(), theirs.get_verbosity()
    bnb = logging.getLogger("bitsandbytes")
    bnb_level = bnb.level
    theirs.disable_progress_bar()
    theirs.set_verbosity_error()
    bnb.setLevel(logging.ERROR)
    try:
        yield
    finally:
        bnb.setLevel(bnb_level)
        theirs.set_verbosity(verbosity)
        if bars:
            theirs.enable_progress_bar()


def _config(
    source: str, *, task: str, num_labels: int | None, label2id: Mapping[str, int] | None, offline: bool
) -> Any:
    from transformers import AutoConfig

    labels: dict[str, Any] = {}
    if label2id is not None:
        if num_labels is not None and num_labels != len(label2id):
            raise BaseModelError(f"num_labels is {num_labels} and label2id names {len(label2id)} labels")
        labels = {"label2id": dict(label2id), "id2label": {number: label for label, number in label2id.items()}}
    elif num_labels is not None:
        labels = {"num_labels": num_labels}
    if task == "classify":
        labels["problem_type"] = "single_label_classification"
    return AutoConfig.from_pretrained(source, local_files_only=offline, trust_remote_code=False, **labels)


def _check_architecture(name: str, config: Any, task: str) -> None:
    both = bool(getattr(config, "is_encoder_decoder", False))
    if task == "seq2seq" and not both:
        raise BaseModelError(f"{name}: task seq2seq needs an encoder and a decoder", hint="task: causal-lm")
    if task == "causal-lm" and both:
        raise BaseModelError(f"{name} has an encoder and a decoder, which task causal-lm does not use both of",
                             hint="task: seq2seq")  # fmt: skip


def _tokenizer(source: str, config: Any, *, offline: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, config=config, local_files_only=offline, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise
        raise BaseModelError(
            f"{source}: no tokenizer that can be read", hint="a base needs its tokenizer.json beside its weights"
        ) from error


def _model(
    source: str,
    config: Any,
    task: str,
    *,
    dtype: str | torch.dtype,
    device: torch.device,
    quantize: str | None,
    offline: bool,
) -> Any:
    import transformers

    kinds = {
        "causal-lm": transformers.AutoModelForCausalLM,
        "classify": transformers.AutoModelForSequenceClassification,
        "tokens": transformers.AutoModelForTokenClassification,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
    }
    placed = {"quantization_config": _quantization(quantize), "device_map": {"": device}} if quantize else {}
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(_HEAD_SEED)
        model, info = kinds[task].from_pretrained(
            source,
            config=config,
            dtype=dtype,
            local_files_only=offline,
            trust_remote_code=False,
            output_loading_info=True,
            **placed,
        )
    _check_filled(source, task, info)
    if not (quantize or getattr(model, "is_quantized", False)):
        return model.to(device)
    for module in model.modules():
        # At the first inference on a CPU, bitsandbytes would pack 4-bit weights in place into a form that passes no
        # gradient on: the base would change under its adapters, and training after evaluating would go wrong unseen.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _quantization(kind: str | None) -> Any:
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        # fp16 overflows in 4-bit training; bf16 does not.
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _check_filled(source: str, task: str, info: Mapping[str, Any]) -> None:
    """Refuse a model of which the checkpoint fills only a part; a new classification head is expected and said."""
    missing = sorted(info["missing_keys"])
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
    head = [key for key in missing if task in _NEW_HEADS and key.split(".")[0] in _HEADS]
    absent = [key for key in missing if key not in head]
    if absent or mismatched or info["error_msgs"]:
        misfits = listed(mismatched) if mismatched else " ".join(map(str, info["error_msgs"]))
        what = f"{listed(absent)} missing" if absent else f"{misfits} of another shape"
        resized = mismatched and task in _NEW_HEADS
        hint = "a head of another size was asked for" if resized else "the checkpoint is not whole"
        raise BaseModelError(f"{source}: the weights do not fill the model: {what}", hint=hint)
    if head:
        logger.info("%s: new head, not in the checkpoint: %s", source, listed(head))


def head_modules(model: Any, task: str) -> tuple[str, ...]:
    """Paths of the modules that make up the model's head: what feature extraction trains.

    Raises:
        BaseModelError: the model has no head that is known.
    """
    if task in _NEW_HEADS:
        parts = [name for name, child in model.named_children() if name in _HEADS]
        found = tuple(name for name in parts if any(True for _ in getattr(model, name).parameters()))
    else:
        output = model.get_output_embeddings()
        found = tuple(name for name, module in model.named_modules() if module is output and output is not None)[:1]
    if not found:
        hint = "name it in lora.modules_to_save"
        raise BaseModelError(f"{type(model).__name__} has no head that is known", hint=hint)
    return found


def _ensure_pad(model: Any, tokenizer: Any, name: str, task: str) -> None:
    """Make the pad token exist. Reusing EOS is safe: padding is masked by its place, never by its id."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise BaseModelError(f"{name}: the tokenizer has neither a pad token nor an EOS token")
        tokenizer.pad_token = tokenizer.eos_token
        logger.info("%s: no pad token; %r is used, behind an attention mask", name, tokenizer.eos_token)
    config = model.config.get_text_config()
    # Decoders that classify look for the last token that is not padding, by this id.
    if config.pad_token_id is None or task == "classify":
        config.pad_token_id = tokenizer.pad_token_id
        model.config.pad_token_id = tokenizer.pad_token_id
    generation = getattr(model, "generation_config", None)
    if generation is not None and generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
