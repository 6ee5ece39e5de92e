"""Pretrain `kit-base`, the small decoder that ships with lora_kit.

    python -m lora_kit.models.kit_base.pretrain stories.txt --work runs/kit-base --minutes 100

Input: any UTF-8 text file (or `.xz`) whose documents are separated by `<|endoftext|>`. Every 40th document is held out.
Output in `--out`: a folder that `AutoModelForCausalLM.from_pretrained` reads (bf16) and `training.json` with what was
seen and reached.

The schedule follows the share of `--minutes` that has been spent, so a run ends on time on any machine; stop it and
start the same command again to resume from the last checkpoint in `--work`.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_kit.io.atomic_write import stage_file

SEPARATOR = "<|endoftext|>"
PAD = "<|pad|>"
HELD_OUT_EVERY = 40
# Words with their leading space, single digits, runs of punctuation, white space.
SPLIT = r" ?\p{L}+(?:'\p{L}+)?| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Settings:
    """What a run is made of.

    Attributes:
        vocab_size: entries of the byte-level BPE, specials included.
        context: tokens per training window, and the longest context of the model.
        batch: windows per optimiser step.
        minutes: time to spend; learning rates follow the share of it already spent.
        muon_lr: peak rate of the matrices inside the decoder layers (torch.optim.Muon).
        adamw_lr: peak rate of embeddings and norms (torch.optim.AdamW).
        warmup, cooldown: shares of the run with a rising and a falling rate.
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    context: int = 512
    batch: int = 8
    minutes: float = 100.0
    muon_lr: float = 0.02
    adamw_lr: float = 0.003
    warmup: float = 0.01
    cooldown: float = 0.5
    seed: int = 0


def read_documents(path: Path) -> list[str]:
    """The documents of a text file, stripped, empty ones left out."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [text for part in file.read().split(SEPARATOR) if (text := part.strip())]


def split_documents(documents: list[str]) -> tuple[list[str], list[str]]:
    """(train, held out): every `HELD_OUT_EVERY`-th document is held out, the last one at least."""
    held = documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or documents[-1:]
    chosen = set(map(id, held))
    return [text for text in documents if id(text) not in chosen], held


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: no text is unknown to it, and decoding returns the text exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=Settings.context,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    """All documents as one uint16 stream, each followed by the separator."""
    eos = tokenizer.eos_token_id
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    return np.concatenate([np.array([*encoding.ids, eos], dtype=np.uint16) for encoding in encodings])


def prepare(text: Path, work: Path, settings: Settings) -> PreTrainedTokenizerFast:
    """Train the tokenizer and encode the text into `work` once; later calls read what is there."""
    done = work / "prepared.json"
    if not done.exists():
        train, held = split_documents(read_documents(text))
        tokenizer = train_tokenizer(train, settings.vocab_size)
        tokenizer.save_pretrained(work / "tokenizer")
        np.save(work / "train.npy", encode(tokenizer, train))
        np.save(work / "held.npy", encode(tokenizer, held))
        held_bytes = sum(len(document.encode()) for document in held)
        done.write_text(json.dumps({"documents": len(train), "held_out": len(held), "held_bytes": held_bytes}))
    return PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised Llama with tied embeddings; residual outputs start small."""
    config = LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.mul_(1 / math.sqrt(2 * settings.layers))
    return model


def build_optimizers(model: LlamaForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the decoder layers, AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=settings.muon_lr, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=settings.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(spent: float, settings: Settings) -> float:
    """Share of the peak learning rate once `spent` (0 to 1) of the time is gone: rise, plateau, linear fall."""
    return min(1.0, spent / settings.warmup, max(0.0, 1.0 - spent) / settings.cooldown)


class Windows:
    """Windows of `context + 1` tokens in a random order, each once per pass, with a new offset every pass."""

    def __init__(self, stream: np.ndarray, settings: Settings) -> None:
        self.stream, self.settings = stream, settings
        self.epoch = self.cursor = 0
        self._shuffle()

    def _shuffle(self) -> None:
        generator = np.random.default_rng((self.settings.seed, self.epoch))
        context = self.settings.context
        offset = int(generator.integers(context)) if len(self.stream) > 2 * context else 0
        self.starts = generator.permutation(np.arange(offset, len(self.stream) - context, context))

    def seek(self, epoch: int, cursor: int) -> None:
        self.epoch, self.cursor = epoch, cursor
        self._shuffle()

    def batch(self) -> torch.Tensor:
        """The next windows: int64 (batch, context + 1)."""
        if self.cursor + self.settings.batch > len(self.starts):
            self.seek(self.epoch + 1, 0)
        chosen = self.starts[self.cursor : self.cursor + self.settings.batch]
        self.cursor += self.settings.batch
        rows = [self.stream[start : start + self.settings.context + 1] for start in chosen]
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def loss_of(model: Callable[..., Any], windows: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats over windows (batch, context + 1)."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(
    model: Callable[..., Any], held: np.ndarray, held_bytes: int, settings: Settings, most: int = 10**9
) -> float:
    """Bits the model needs per held-out byte, over at most `most` windows spread over the text."""
    windows = np.arange(0, len(held) - settings.context - 1, settings.context)
    windows = windows[:: max(1, math.ceil(len(windows) / most))]
    nats = 0.0
    for start in range(0, len(windows), settings.batch):
        rows = [held[w : w + settings.context + 1] for w in windows[start : start + settings.batch]]
        nats += loss_of(model, torch.from_numpy(np.stack(rows).astype(np.int64))).item() * len(rows)
    return nats / len(windows) / math.log(2) * len(held) / held_bytes


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the state of an unfinished training all or nothing."""
    with stage_file(path) as staging:
        torch.save(state, staging)


def train(
    work: Path, tokenizer: PreTrainedTokenizerFast, settings: Settings
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Train until the time is spent; returns the model and what was seen."""
    prepared = json.loads((work / "prepared.json").read_text())
    stream, held = np.load(work / "train.npy"), np.load(work / "held.npy")
    windows = Windows(stream, settings)
    model = build_model(settings, tokenizer)
    optimizers = build_optimizers(model, settings)
    progress: dict[str, Any] = {"steps": 0, "tokens": 0, "seconds": 0.0}
    state_file = work / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        windows.seek(*state["position"])
        progress = state["progress"]
        print(f"resumed at {progress['tokens']:,} tokens")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.nn.Module.to(model, device)
    forward = torch.compile(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    budget, last, saved_at, smooth = settings.minutes * 60, time.monotonic(), 0.0, 0.0
    while progress["seconds"] < budget:
        scale = rate(progress["seconds"] / budget + 1e-4, settings)
        batch = windows.batch().to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = loss_of(forward, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        now = time.monotonic()
        progress["steps"] += 1
        progress["tokens"] += batch[:, 1:].numel()
        progress["seconds"] += now - last
        last = now
        smooth = loss.item() if not smooth else 0.98 * smooth + 0.02 * loss.item()
        if progress["steps"] % 50 == 0:
            speed = progress["tokens"] / progress["seconds"]
            left = (budget - progress["seconds"]) / 60
            print(
                f"{progress['tokens']:>12,} tokens  loss {smooth:.3f}  rate {scale:.2f}  "
                f"{speed:,.0f} tokens/s  {left:.1f} min left",
                flush=True,
            )
        if progress["seconds"] - saved_at > 300 or progress["seconds"] >= budget:
            saved_at = progress["seconds"]
            with torch.autocast(device, dtype=torch.bfloat16):
                quick = bits_per_byte(forward, held, prepared["held_bytes"], settings, most=64)
            print(f"{progress['tokens']:>12,} tokens  held out {quick:.3f} bits per byte (64 windows)", flush=True)
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "position": [windows.epoch, windows.cursor],
                "progress": progress,
            }
            save_state(state_file, state)
            last = time.monotonic()
    return model, progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="where encoded text and checkpoints are kept")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    for name in ("minutes", "batch", "muon_lr", "adamw_lr", "seed"):
        default = getattr(Settings, name)
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    arguments = vars(parser.parse_args())
    text, work, out = arguments.pop("text"), arguments.pop("work"), arguments.pop("out")
    settings = Settings(**arguments)
    work.mkdir(parents=True, exist_ok=True)

    tokenizer = prepare(text, work, settings)
    model, progress = train(work, tokenizer, settings)
    torch.nn.Module.to(model, "cpu", torch.bfloat16).eval()
    prepared = json.loads((work / "prepared.json").read_text())
    held = np.load(work / "held.npy")
    report = {
        **asdict(settings),
        **progress,
        **prepared,
        "parameters": model.num_parameters(),
        "bits_per_byte": round(bits_per_byte(model, held, prepared["held_bytes"], settings), 4),
        "torch": torch.__version__,
    }
    model.generation_config.update(do_sample=False)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
