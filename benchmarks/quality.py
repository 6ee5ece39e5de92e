"""E2E NLG: does training an adapter work as well as training everything?

Restaurant attributes become a sentence. The base itself, features (a trained head on a frozen body), LoRA, LoRA with
the embeddings and norms trained whole, and full fine-tuning get the same data in the same order, the same batches,
steps, schedule and optimizer. Each has its learning rate chosen from three, a factor of two apart, by the perplexity on
part of the validation set after shorter runs. Then one run each, perplexity on all of validation and test, and
sacreBLEU of what is written for each prompt of the test set.

    python -m benchmarks.quality --data FOLDER     # train.jsonl, valid.jsonl, test.jsonl
    python -m benchmarks.quality --table           # README.md from the result, nothing else

Finished runs are kept in the work folder, under a key of everything that decides their outcome, and are not done again.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.harness import HERE, README, RESULTS, WORK, fill

RESULT: Final = RESULTS / "quality.json"
SPLITS: Final = ("train", "valid", "test")
LIBRARIES: Final = ("lora-kit", "torch", "transformers", "tokenizers", "accelerate", "sacrebleu")
SAMPLES: Final = 5
MAX_LENGTH: Final = 256
MAX_NEW_TOKENS: Final = 128


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train.

    Attributes:
        what: a line for the table.
        lora: the recipe's `lora` section, None where it has none.
        rates: learning rates that are tried; empty for the base itself.
    """

    what: str
    lora: Mapping[str, Any] | None = None
    rates: tuple[float, ...] = ()


LINEARS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EMBEDDINGS: Final = ("embed_tokens", "lm_head")
NORMS: Final = ("input_layernorm", "post_attention_layernorm", "norm")

METHODS: Final[Mapping[str, Method]] = {
    "base": Method(what="the base itself"),
    "features": Method(
        what="features: a trained `lm_head`, the body frozen",
        lora={"modules_to_save": ["lm_head"]},
        rates=(5e-3, 1e-2, 2e-2),
    ),
    "lora": Method(
        what="LoRA r=16 on all linear layers, embedding and head",
        # B of an embedding starts at deviation 1, not at 0: with the alpha of the others its update would be enormous.
        lora={
            "r": 16,
            "lora_alpha": 128,
            "target_modules": (*LINEARS, *EMBEDDINGS),
            "alpha_pattern": {"embed_tokens": 4},
        },
        rates=(1e-3, 2e-3, 4e-3),
    ),
    "lora-embeddings": Method(
        what="LoRA r=16 on the decoder's linear layers; embedding, head and norms trained whole",
        lora={"r": 16, "lora_alpha": 128, "target_modules": LINEARS, "modules_to_save": (*EMBEDDINGS, *NORMS)},
        rates=(1e-3, 2e-3, 4e-3),
    ),
    "full": Method(what="full fine-tuning", rates=(1.5e-3, 3e-3, 6e-3)),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything besides data and base that decides the outcome.

    Attributes:
        steps: optimizer steps of each method's run.
        search_steps: steps of a run that tries a learning rate.
        search_rows: validation rows that judge such a run.
        batch: rows in a step.
        limit: rows of each split at most; None for all.
        prompts: test prompts to write sentences for; None for all.
        beams: 1 takes the likeliest token each time.
        seed: of the order of the rows and of the adapter's start.
    """

    steps: int = 1500
    search_steps: int = 300
    search_rows: int = 1000
    batch: int = 16
    limit: int | None = None
    prompts: int | None = None
    beams: int = 1
    seed: int = 0


DEFAULTS: Final = Settings()


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parsed(argv)
    if arguments.table:
        fill(README, page(json.loads(arguments.out.read_text(encoding="utf-8"))), mark="quality")
        return
    settings = Settings(**{name: getattr(arguments, name) for name in asdict(DEFAULTS)})
    bench = Bench(arguments.data, arguments.work, settings)
    methods = {name: bench.method(name) for name in arguments.methods}
    result = {
        "benchmark": "quality",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": command(settings),
        "settings": asdict(settings),
        "base": bench.base_facts(),
        "data": bench.data_facts(),
        "versions": {name: version(name) for name in LIBRARIES},
        "machine": machine(),
        "methods": methods,
        "samples": bench.samples(methods),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    say(f"wrote {arguments.out}")
    print(table(result))
    if arguments.out.resolve() == RESULT:
        fill(README, page(result), mark="quality")


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="train.jsonl, valid.jsonl and test.jsonl")
    parser.add_argument("--work", type=Path, default=WORK / "quality", help="what finished runs leave")
    parser.add_argument("--out", type=Path, default=RESULT, help="the result; README.md follows the default one only")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    for field in fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=int, default=field.default, help="default: %(default)s")
    parser.add_argument("--table", action="store_true", help="write README.md from the result that is there, and stop")
    arguments = parser.parse_args(argv)
    if arguments.data is None and not arguments.table:
        parser.error("--data is needed: a folder with train.jsonl, valid.jsonl and test.jsonl")
    return arguments


class Bench:
    """The runs on one data set with one set of settings, each done once."""

    def __init__(self, data: Path, work: Path, settings: Settings) -> None:
        self.settings = settings
        self.rows = {split: read(data / f"{split}.jsonl", settings.limit) for split in SPLITS}
        methods = {name: asdict(method) for name, method in METHODS.items()}
        decides = json.dumps([asdict(settings), methods, self.data_facts(), self.base_facts()], sort_keys=True)
        self.work = work / hashlib.sha256(decides.encode()).hexdigest()[:12]
        self.files = {split: self.work / "data" / f"{split}.jsonl" for split in SPLITS}
        for split, file in self.files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows[split])
            # Another process may be reading it, at work on other methods in the same folder.
            if not file.exists() or file.read_text("utf-8") != text:
                file.write_text(text, "utf-8")

    def method(self, name: str) -> dict[str, Any]:
        """What a method came to."""
        return self.once(name, partial(self._method, name))

    def once(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a piece of work, from the work folder where it was finished before."""
        kept = self.work / f"{name}.json"
        if kept.exists():
            say(f"{name}: finished before")
        else:
            partial_file = kept.with_suffix(".partial")
            partial_file.write_text(json.dumps(work(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            partial_file.replace(kept)
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found

    def _method(self, name: str) -> dict[str, Any]:
        rates = METHODS[name].rates
        tried = {rate: self.once(f"{name}-{rate:g}", partial(self._tried, name, rate)) for rate in rates}
        found: dict[str, Any] = {"what": METHODS[name].what}
        if tried:
            # None: it diverged.
            best = min(tried, key=lambda rate: tried[rate]["perplexity"] or math.inf)
            search = {f"{rate:g}": run["perplexity"] for rate, run in tried.items()}
            found |= {"search": search, "search_seconds": round(sum(run["seconds"] for run in tried.values()), 1)}
            found |= {"learning_rate": best, **self._train(name, best, self.settings.steps, f"{name}-run")}
        with self.ready(name, f"{name}-run") as (model, tokenizer):
            for split in ("valid", "test"):
                found[split] = self._perplexity(model, tokenizer, split)
                say(f"{name}: {split} perplexity {found[split]['perplexity']:.4f}")
            found |= self._written(model, tokenizer)
            say(f"{name}: BLEU {found['bleu']['score']:.2f}")
        return found

    def _tried(self, name: str, rate: float) -> dict[str, Any]:
        """Perplexity on part of the validation set after a short run with a learning rate."""
        from lora_kit.errors import VerificationError

        folder = f"{name}-{rate:g}"
        try:
            trained = self._train(name, rate, self.settings.search_steps, folder)
        except VerificationError as error:
            say(f"{name}: learning rate {rate:g}: {error}")
            return {"perplexity": None, "seconds": 0.0}
        with self.ready(name, folder) as (model, tokenizer):
            found = self._perplexity(model, tokenizer, "valid", rows=self.settings.search_rows)
        say(f"{name}: learning rate {rate:g}: perplexity {found['perplexity']:.4f}")
        return {"perplexity": found["perplexity"], "seconds": trained["train_seconds"]}

    def _train(self, name: str, rate: float, steps: int, folder: str) -> dict[str, Any]:
        import lora_kit as lk

        say(f"{name}: {steps} steps at learning rate {rate:g}")
        out = self.work / folder
        recipe: dict[str, Any] = {
            "base": "kit-base",
            "dtype": "fp32",
            "method": name.partition("-")[0],
            "data": {"train": str(self.files["train"]), "max_length": MAX_LENGTH},
            "train": {
                "max_steps": steps,
                "learning_rate": rate,
                "lr_scheduler_type": "linear",
                "warmup_steps": max(1, steps // 20),
                "weight_decay": 0.0,
                # At 0.999 the second moment averages over 1,000 steps, most of so short a run.
                "adam_beta2": 0.98,
                "bf16": True,
                "train_sampling_strategy": "group_by_length",
                "per_device_train_batch_size": self.settings.batch,
                "logging_steps": 50,
                "seed": self.settings.seed,
            },
            "out": str(out),
        }
        if METHODS[name].lora is not None:
            recipe["lora"] = dict(METHODS[name].lora or {})
        report = lk.train(recipe, replace=True)
        return {
            "trainable_parameters": report.trainable,
            "train_seconds": round(report.seconds, 1),
            "tokens": report.tokens,
            "artifact_bytes": sum(file.stat().st_size for file in out.iterdir() if file.suffix == ".safetensors"),
        }

    @contextmanager
    def ready(self, name: str, folder: str) -> Iterator[tuple[Any, Any]]:
        """(model, tokenizer) as a method left them: an adapter in a bank, or a model of its own."""
        import lora_kit as lk

        base = lk.load_base(self.work / folder if name == "full" else "kit-base", dtype="fp32")
        if METHODS[name].lora is None:
            yield base.model, base.tokenizer
        else:
            bank = lk.attach(base.model, slots=1)
            bank.load(name, self.work / folder)
            with bank.using(name):
                yield base.model, base.tokenizer
        del base
        gc.collect()

    def _perplexity(self, model: Any, tokenizer: Any, split: str, *, rows: int | None = None) -> dict[str, Any]:
        """Per token of the completions, end included, given the prompts."""
        from lora_kit.data.batches import Collator
        from lora_kit.data.encode import encode
        from lora_kit.data.rows import Rows, read_rows
        from lora_kit.evaluation.measure import measure

        read_ = read_rows(self.files[split])
        step = max(1, len(read_) // rows) if rows else 1
        chosen = Rows(read_.path, read_.format, read_.values[::step], read_.lines[::step])
        data = encode(chosen, tokenizer, max_length=MAX_LENGTH)
        found = measure(model, data, Collator(tokenizer.pad_token_id), batch_size=32)
        return {"perplexity": found.perplexity, "loss": found.loss, "tokens": found.labels, "rows": found.samples}

    def _written(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Sentences for the prompts of the test set, and their BLEU against all references of each."""
        import sacrebleu

        references = self.references()
        prompts = list(references)[: self.settings.prompts]
        started = time.perf_counter()
        texts = write(model, tokenizer, prompts, beams=self.settings.beams)
        # One stream per place in the lists of references; None where a prompt has fewer.
        streams: list[Any] = list(zip_longest(*(references[prompt] for prompt in prompts)))
        metric = sacrebleu.metrics.BLEU()
        score = metric.corpus_score(texts, streams)
        return {
            "bleu": {"score": score.score, "prompts": len(prompts), "signature": str(metric.get_signature())},
            "generate_seconds": round(time.perf_counter() - started, 1),
            "texts": dict(zip(prompts, texts, strict=True)),
        }

    def references(self) -> dict[str, list[str]]:
        """The sentences people wrote, by prompt, in the order of the test set."""
        found: dict[str, list[str]] = {}
        for row in self.rows["test"]:
            found.setdefault(row["prompt"], []).append(row["completion"])
        return found

    def samples(self, methods: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """A few prompts spread over the test set with what each method wrote; takes the texts out of `methods`."""
        texts = {name: found.pop("texts") for name, found in methods.items()}
        references = self.references()
        prompts = list(next(iter(texts.values())))
        chosen = prompts[len(prompts) // (2 * SAMPLES) :: max(1, len(prompts) // SAMPLES)][:SAMPLES]
        return [
            {
                "prompt": prompt,
                "reference": references[prompt][0],
                "texts": {name: texts[name][prompt] for name in texts},
            }
            for prompt in chosen
        ]

    def data_facts(self) -> dict[str, Any]:
        return {
            split: {"rows": len(rows), "sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}
            for split, rows in self.rows.items()
        }

    def base_facts(self) -> dict[str, Any]:
        weights = HERE.parent / "lora_kit" / "models" / "kit_base" / "model.safetensors"
        return {"name": "kit-base", "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}


def write(model: Any, tokenizer: Any, prompts: Sequence[str], *, beams: int, batch: int = 64) -> list[str]:
    """What a model writes after each prompt, in batches of similar length."""
    import torch

    from lora_kit.models.prompt_tokens import render_prompt, tokenize_prompt

    ids = [tokenize_prompt(tokenizer, render_prompt(prompt)) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    texts = [""] * len(ids)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        longest = max(len(ids[index]) for index in chosen)
        padding = [longest - len(ids[index]) for index in chosen]
        rows = [[tokenizer.pad_token_id] * pad + ids[index] for pad, index in zip(padding, chosen, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
        with torch.inference_mode():
            out = model.generate(
                input_ids=torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=MAX_NEW_TOKENS,
                max_length=None,
                do_sample=False,
                num_beams=beams,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        for index, row in zip(chosen, out[:, longest:], strict=True):
            texts[index] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return texts


def command(settings: Settings) -> str:
    """The command that does the same again; the data's folder is the reader's own."""
    changed = {k: v for k, v in asdict(settings).items() if v != getattr(DEFAULTS, k)}
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in changed.items()]
    return " ".join(["python -m benchmarks.quality --data FOLDER", *flags])


def read(file: Path, limit: int | None) -> list[dict[str, str]]:
    """Rows of a JSONL file; with a limit, that many spread over it."""
    with file.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    return rows[:: max(1, len(rows) // limit)][:limit] if limit else rows


def machine() -> dict[str, Any]:
    import torch

    facts = {"python": platform.python_version(), "threads": torch.get_num_threads(), "cpu": processor()}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def processor() -> str:
    """The kind of CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(result: Mapping[str, Any]) -> str:
    """Return the methods side by side, as Markdown."""
    methods = result["methods"]
    full = methods.get("full", {}).get("test", {}).get("perplexity")
    lines = [
        "| method | trained | file | learning rate (tried) | perplexity valid | test | test vs full | BLEU | time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for found in methods.values():
        test = found["test"]["perplexity"]
        trained = "search" in found
        rates = ", ".join(found.get("search", {}))
        cells = [
            found["what"],
            f"{found['trainable_parameters']:,}" if trained else "0",
            f"{found['artifact_bytes'] / 1e6:.1f} MB" if trained else "–",
            f"{found['learning_rate']:g} ({rates})" if trained else "–",
            f"{found['valid']['perplexity']:.3f}",
            f"{test:.3f}",
            f"{100 * (test / full - 1):+.1f} %" if full else "–",
            f"{found['bleu']['score']:.1f}",
            f"{found['train_seconds'] / 60:.1f} min" if trained else "–",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def samples_table(result: Mapping[str, Any]) -> str:
    parts = []
    for sample in result["samples"]:
        parts.append(f"**{escaped(sample['prompt'])}**\n")
        parts.append(f"- a person: {escaped(sample['reference'])}")
        parts += [f"- {name}: {escaped(text)}" for name, text in sample["texts"].items()]
        parts.append("")
    return "\n".join(parts).rstrip()


def escaped(text: str) -> str:
    """One line that Markdown shows as it is, cut where a model does not stop."""
    line = " ".join(text.split())
    line = line if len(line) <= 200 else line[:200] + " …"
    return "".join("\\" + c if c in "\\`*_[]<>|#" else c for c in line) or "(nothing)"


def page(result: Mapping[str, Any]) -> str:
    """Return the result as Markdown."""
    settings, made = result["settings"], result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    rows = {split: facts["rows"] for split, facts in result["data"].items()}
    device = made.get("gpu") or f"{made['cpu']}, {made['threads']} threads"
    return f"""{table(result)}

{settings["steps"]:,} steps of {settings["batch"]} rows for each method; learning rates tried with
{settings["search_steps"]:,} steps each; {rows["train"]:,} / {rows["valid"]:,} / {rows["test"]:,} rows;
{device}; {result["date"]};
base {result["base"]["sha256"][:12]}; {versions}.
BLEU: sacreBLEU, {next(iter(result["methods"].values()))["bleu"]["signature"]}.

{samples_table(result)}
"""


def say(line: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
