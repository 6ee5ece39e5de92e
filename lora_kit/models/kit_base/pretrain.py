"""Pretrain `kit-base`, the small decoder that ships with lora_kit.

    python -m lora_kit.models.kit_base.pretrain stories.txt --work runs/kit-base --minutes 100

Input: any UTF-8 text file (or `.xz`) whose documents are separated by `<|endoftext|>`. Every 40th document is held out.
Output in `--out`: a folder that `AutoModelForCausalLM.from_pretrained` reads (bf16) and `training.json` with the
settings, the tokens trained on and the result.

The schedule follows the share of `--minutes` that has been spent, so a run ends on time on any machine. To resume a
stopped run from the last checkpoint in `--work`, start the same command again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Protocol, TypedDict

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from lora_kit.models.kit_base.corpus import Windows, encode, read_documents, split_documents, train_tokenizer

STEPS_PER_REPORT: Final = 50
SECONDS_PER_CHECKPOINT: Final = 300
QUICK_WINDOWS: Final = 64
"""Held-out windows that are evaluated at a checkpoint; all of them at the end."""


@dataclass(frozen=True)
class PretrainingSettings:
    """PretrainingSettings of a run.

    Attributes:
        vocab_size: entries of the byte-level BPE, special tokens included.
        hidden_size: width of the hidden states.
        intermediate_size: width inside the MLPs.
        layers: decoder layers.
        heads: attention heads of a layer.
        kv_heads: key and value heads of a layer.
        context: tokens in a training window, and the longest context of the model.
        batch: windows in an optimizer step.
        minutes: time to spend; learning rates follow the share of it already spent.
        muon_lr: peak learning rate of the matrices inside the decoder layers (torch.optim.Muon).
        adamw_lr: peak learning rate of embeddings and norms (torch.optim.AdamW).
        warmup: share of the run with a rising learning rate.
        cooldown: share of the run with a falling learning rate.
        seed: of the initial weights and of the order of the windows.
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


class Progress(TypedDict):
    """How far a run is."""

    steps: int
    tokens: int
    seconds: float


class ForwardPass(Protocol):
    """A language model, compiled or not."""

    def __call__(self, *, input_ids: torch.Tensor, use_cache: bool) -> CausalLMOutputWithPast: ...


def prepare(text: Path, work: Path, settings: PretrainingSettings) -> PreTrainedTokenizerFast:
    """Train the tokenizer and encode the text into `work`. Later calls only load the tokenizer from there."""
    done = work / "prepared.json"
    if not done.exists():
        train, held = split_documents(read_documents(text))
        tokenizer = train_tokenizer(train, settings.vocab_size, context=settings.context)
        tokenizer.save_pretrained(work / "tokenizer")
        np.save(work / "train.npy", encode(tokenizer, train))
        np.save(work / "held.npy", encode(tokenizer, held))
        held_bytes = sum(len(document.encode()) for document in held)
        done.write_text(json.dumps({"documents": len(train), "held_out": len(held), "held_bytes": held_bytes}))
    return PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")


def build_model(settings: PretrainingSettings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a randomly initialized Llama with tied embeddings, whose residual outputs start small."""
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


def build_optimizers(model: LlamaForCausalLM, settings: PretrainingSettings) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the decoder layers, and AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=settings.muon_lr, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=settings.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def scale_learning_rate(spent: float, settings: PretrainingSettings) -> float:
    """Return the share of the peak learning rate after a share `spent` of the time: rise, plateau, linear fall."""
    return min(1.0, spent / settings.warmup, max(0.0, 1.0 - spent) / settings.cooldown)


def compute_loss(model: ForwardPass, windows: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token cross-entropy in nats over windows (batch, context + 1)."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    assert logits is not None
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def compute_bits_per_byte(
    model: ForwardPass,
    held: np.ndarray,
    held_bytes: int,
    settings: PretrainingSettings,
    *,
    max_windows: int | None = None,
    device: str = "cpu",
) -> float:
    """Return the bits that the model needs per held-out byte.

    Args:
        model: on `device`.
        held: stream of held-out ids, uint16 (tokens,).
        held_bytes: UTF-8 bytes of the held-out text.
        settings: of the run.
        max_windows: how many windows, spread over the text, are evaluated; None for all of them.
        device: of the model.
    """
    starts = np.arange(0, len(held) - settings.context - 1, settings.context)
    starts = starts[:: max(1, math.ceil(len(starts) / (max_windows or len(starts))))]
    nats = 0.0
    for first in range(0, len(starts), settings.batch):
        rows = [held[start : start + settings.context + 1] for start in starts[first : first + settings.batch]]
        windows = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)
        nats += compute_loss(model, windows).item() * len(rows)
    return nats / len(starts) / math.log(2) * len(held) / held_bytes


class PretrainingRun:
    """A run on encoded text in a folder, which goes on from the folder's checkpoint if there is one.

    Attributes:
        model: on the device of the run.
        progress: steps, tokens and seconds so far, those before a resumption included.
    """

    def __init__(self, work: Path, tokenizer: PreTrainedTokenizerFast, settings: PretrainingSettings) -> None:
        self._settings, self._checkpoint = settings, work / "state.pt"
        self._held = np.load(work / "held.npy")
        self._held_bytes: int = json.loads((work / "prepared.json").read_text())["held_bytes"]
        self._windows = Windows(
            np.load(work / "train.npy"), context=settings.context, batch=settings.batch, seed=settings.seed
        )
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = build_model(settings, tokenizer)
        torch.nn.Module.to(self.model, self._device)
        self._forward: ForwardPass = torch.compile(self.model)
        self._optimizers = build_optimizers(self.model, settings)
        self._peaks = [optimizer.param_groups[0]["lr"] for optimizer in self._optimizers]
        self._smooth_loss: float | None = None
        self.progress: Progress = {"steps": 0, "tokens": 0, "seconds": 0.0}
        if self._checkpoint.exists():
            self._load_checkpoint()

    def train(self) -> None:
        """Train until the time is spent, with a checkpoint every few minutes and at the end."""
        budget, last, saved_at = self._settings.minutes * 60, time.monotonic(), 0.0
        while self.progress["seconds"] < budget:
            scale = scale_learning_rate(self.progress["seconds"] / budget + 1e-4, self._settings)
            loss, tokens = self._step(scale)
            now = time.monotonic()
            self.progress["steps"] += 1
            self.progress["tokens"] += tokens
            self.progress["seconds"] += now - last
            last = now
            self._smooth_loss = loss if self._smooth_loss is None else 0.98 * self._smooth_loss + 0.02 * loss
            if self.progress["steps"] % STEPS_PER_REPORT == 0:
                self._print_progress(scale, budget)
            if self.progress["seconds"] - saved_at > SECONDS_PER_CHECKPOINT or self.progress["seconds"] >= budget:
                saved_at = self.progress["seconds"]
                self._evaluate()
                self._save_checkpoint()
                last = time.monotonic()  # the time of a checkpoint is not counted

    def _step(self, scale: float) -> tuple[float, int]:
        """Take one optimizer step; return its loss in nats and how many tokens it predicted."""
        batch = self._windows.next_batch().to(self._device)
        with torch.autocast(self._device, dtype=torch.bfloat16):
            loss = compute_loss(self._forward, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, peak in zip(self._optimizers, self._peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item(), batch[:, 1:].numel()

    def _print_progress(self, scale: float, budget: float) -> None:
        tokens, seconds = self.progress["tokens"], self.progress["seconds"]
        print(
            f"{tokens:>12,} tokens  loss {self._smooth_loss:.3f}  rate {scale:.2f}  "
            f"{tokens / seconds:,.0f} tokens/s  {(budget - seconds) / 60:.1f} min left",
            flush=True,
        )

    def _evaluate(self) -> None:
        with torch.autocast(self._device, dtype=torch.bfloat16):
            bits = compute_bits_per_byte(
                self._forward,
                self._held,
                self._held_bytes,
                self._settings,
                max_windows=QUICK_WINDOWS,
                device=self._device,
            )
        tokens = self.progress["tokens"]
        print(f"{tokens:>12,} tokens  held out {bits:.3f} bits per byte ({QUICK_WINDOWS} windows)", flush=True)

    def _save_checkpoint(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "position": [self._windows.epoch, self._windows.cursor],
            "progress": self.progress,
        }
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self._checkpoint)

    def _load_checkpoint(self) -> None:
        state = torch.load(self._checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._windows.seek(*state["position"])
        self.progress = state["progress"]
        print(f"resumed at {self.progress['tokens']:,} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for the encoded text and checkpoints")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    for name in ("minutes", "batch", "muon_lr", "adamw_lr", "seed"):
        default = getattr(PretrainingSettings, name)
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    arguments = vars(parser.parse_args())
    text, work, out = arguments.pop("text"), arguments.pop("work"), arguments.pop("out")
    settings = PretrainingSettings(**arguments)
    work.mkdir(parents=True, exist_ok=True)

    tokenizer = prepare(text, work, settings)
    run = PretrainingRun(work, tokenizer, settings)
    run.train()
    model = run.model
    torch.nn.Module.to(model, "cpu", torch.bfloat16).eval()
    prepared = json.loads((work / "prepared.json").read_text())
    held = np.load(work / "held.npy")
    report = {
        **asdict(settings),
        **run.progress,
        **prepared,
        "parameters": model.num_parameters(),
        "bits_per_byte": round(compute_bits_per_byte(model, held, prepared["held_bytes"], settings), 4),
        "torch": torch.__version__,
    }
    model.generation_config.update(do_sample=False)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
