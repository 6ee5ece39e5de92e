"""What does a whole training cost, beside TRL's SFTTrainer with PEFT?

Both read the same rows of prompts and completions, of 24 to 320 tokens or of 2,003, in the same order, train an
adapter of rank 16 on all linears of a Llama of 8 layers of width 512 from the same A and B, and save it. Each training
is a process of its own. The loss of every step is compared with TRL's before anything is reported.

Tokens per second are those of the training itself, padding left out. Seconds are of the whole job, from the rows to the
adapter on disk, without imports and loading the model. Memory is the highest of the whole job above what the loaded
model takes. TRL measures accuracy and entropy of the predictions in every step, which is its default.
"""

from __future__ import annotations

import importlib
import itertools
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.harness import Effort, Row, in_own_process, peak_bytes, quartiles, seconds_of, table
from benchmarks.models import ALL, llama

BATCH, R, RATE = 8, 16, 2e-4
CASES: Final = ("trl", "lora_kit")
LARGE: Final = 32_000
MAX_LENGTH: Final = 2048


@dataclass(frozen=True)
class Setting:
    """One training.

    Attributes:
        dtype: `fp32`; `bf16` for a base in fp32 under autocast; `bf16 base` for a base that is held in bf16.
        vocabulary: tokens of the model: kit-base's tokenizer, or `LARGE` for one token per word.
        single: batches of one row, eight accumulated for a step: no padding, in either library.
        long: a step of one row of 2,003 tokens.
        defaults: each library's own for what is not said: TRL checkpoints activations and computes in bf16.
        steps: of the optimizer.
    """

    dtype: str = "fp32"
    vocabulary: int = 4096
    single: bool = False
    long: bool = False
    defaults: bool = False
    steps: int = 12

    @property
    def label(self) -> str:
        how = "each with its defaults" if self.defaults else self.dtype
        rows = ", one row at a time" * self.single + ", one row of 2,003 tokens" * self.long
        return f"{how}, vocabulary {self.vocabulary:,}{rows}"

    @property
    def batch(self) -> int:
        """Rows at once."""
        return 1 if self.single or self.long else BATCH

    @property
    def accumulation(self) -> int:
        """Batches of a step."""
        return BATCH if self.single else 1

    @property
    def bound(self) -> float:
        """How far the losses of a step may be apart, as a share."""
        return 1e-4 if self.dtype == "fp32" and not self.defaults else 2e-2


def prepare(setting: Setting, place: Path) -> None:
    """A base with its tokenizer, and the rows as both read them."""
    import transformers

    config = llama().config
    config.vocab_size, config.eos_token_id, config.max_position_embeddings = setting.vocabulary, 2, MAX_LENGTH
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config)
    model.to(torch.bfloat16 if setting.dtype == "bf16 base" else torch.float32).save_pretrained(place / "base")
    words = list(itertools.islice(words_of_syllables(), LARGE - 3))
    tokenizer_of(setting.vocabulary, words).save_pretrained(place / "base")
    rows = list(rows_of(words, setting))
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def words_of_syllables() -> Iterator[str]:
    """`ba`, `be`, … `baba`, …: words without end, the same ones every time."""
    syllables = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
    for length in itertools.count(1):
        yield from map("".join, itertools.product(syllables, repeat=length))


def tokenizer_of(vocabulary: int, words: Sequence[str]) -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    from lora_kit.models.loading import load_base

    if vocabulary != LARGE:
        return load_base("kit-base").tokenizer
    ids = {word: number for number, word in enumerate(["<unk>", "<pad>", "<eos>", *words])}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )


def rows_of(words: Sequence[str], setting: Setting) -> Iterator[dict[str, str]]:
    """Prompts and completions of words as frequent as those of a language (Zipf), enough for every step."""
    draw = random.Random(0)
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(words) + 1)))
    # kit-base's tokenizer cuts such a word into nearly three.
    share = 1.0 if setting.vocabulary == LARGE else 0.36
    for _ in range(setting.batch * setting.accumulation * setting.steps):
        parts = [round(share * 2 ** draw.uniform(4, 7)), round(share * 2 ** draw.uniform(3, 7))]
        parts = [1000, 1000] if setting.long else parts
        prompt, completion = (" ".join(draw.choices(words, cum_weights=weights, k=count)) for count in parts)
        yield {"prompt": prompt, "completion": completion}


def ours(setting: Setting, place: Path) -> dict[str, Any]:
    import lora_kit as lk
    from lora_kit.models.loading import load_base

    importlib.import_module("lora_kit.training.loop.trainer")  # what a training imports by itself
    base = load_base(place / "base", device="cpu")
    arguments = {**shared(setting), **({"bf16": True} if setting.dtype == "bf16" and not setting.defaults else {})}
    recipe = {
        "base": str(place / "base"),
        "data": {"train": str(place / "rows.jsonl"), "max_length": MAX_LENGTH},
        "lora": {"r": R, "lora_alpha": 2 * R, "target_modules": list(ALL)},
        "train": arguments,
        "out": str(Path(tempfile.mkdtemp(dir=place)) / "adapter"),
    }
    reports: list[lk.TrainReport] = []
    told = measured(base.model, lambda: reports.append(lk.train(recipe, base=base)))
    losses = [entry["loss"] for entry in reports[0].history if "loss" in entry]
    return {**told, "losses": losses, "training": reports[0].seconds, "tokens": reports[0].tokens}


def theirs(setting: Setting, place: Path) -> dict[str, Any]:
    import datasets  # type: ignore[import-untyped]
    import peft
    import transformers
    from trl import SFTConfig, SFTTrainer

    dtype = torch.bfloat16 if setting.dtype == "bf16 base" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "base", dtype=dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "base")
    chosen: dict[str, Any] = (
        {} if setting.defaults else {"bf16": setting.dtype != "fp32", "gradient_checkpointing": False}
    )
    config = peft.LoraConfig(r=R, lora_alpha=2 * R, target_modules=list(ALL), task_type="CAUSAL_LM")
    initial = initial_adapter(place, r=R)
    found: dict[str, Any] = {}

    def job() -> None:
        rows = [json.loads(line) for line in (place / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
        for row in rows:
            row["prompt"] += "\n"
        args = SFTConfig(
            output_dir=tempfile.mkdtemp(dir=place),
            use_cpu=True,
            save_strategy="no",
            max_length=MAX_LENGTH,
            **shared(setting),
            **chosen,
        )
        trainer = SFTTrainer(
            model, args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, peft_config=config
        )
        peft.set_peft_model_state_dict(trainer.model, initial)
        trainer.remove_callback(transformers.PrinterCallback)
        found["training"] = seconds_of(trainer.train)
        trainer.save_model()
        log = trainer.state.log_history
        found["losses"] = [entry["loss"] for entry in log if "loss" in entry]
        found["tokens"] = max(int(entry["num_tokens"]) for entry in log if "num_tokens" in entry)

    return {**measured(model, job), **found}


def shared(setting: Setting) -> dict[str, Any]:
    """What both are told."""
    return {
        "max_steps": setting.steps,
        "per_device_train_batch_size": setting.batch,
        "gradient_accumulation_steps": setting.accumulation,
        "learning_rate": RATE,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def initial_adapter(place: Path, *, r: int) -> Mapping[str, torch.Tensor]:
    """The A and B that lora_kit begins with, under PEFT's keys."""
    import transformers

    import lora_kit as lk

    model = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
    transformers.set_seed(0)
    config = lk.LoraConfig(r=r, lora_alpha=2 * r, target_modules=ALL, task_type="CAUSAL_LM")
    return lk.attach(model, config, name="initial").snapshot("initial").tensors


def measured(model: Any, job: Callable[[], Any]) -> dict[str, Any]:
    """Seconds and peak memory of a job. Loading only maps the weights: they are read once, to count as loaded."""
    for weight in model.parameters():
        weight.sum()
    seconds: list[float] = []
    peak = peak_bytes(lambda: seconds.append(seconds_of(job)))
    return {"seconds": seconds[0], "bytes": peak}


def once(case: str, setting: Setting, place: Path) -> dict[str, Any]:
    """One training. Run in a process of its own."""
    return (ours if case == "lora_kit" else theirs)(setting, place)


def compared(setting: Setting, effort: Effort) -> dict[str, Any]:
    """Both in turn, each round in the other order. A round takes a minute or more: three of them at most."""
    runs: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as place:
        prepare(setting, Path(place))
        for number in range(min(3, effort.rounds)):
            for case in CASES[:: -1 if number % 2 else 1]:
                runs[case].append(in_own_process(once, case, setting, Path(place)))
    check(setting, {case: run[0] for case, run in runs.items()})
    cases = {case: summary(run) for case, run in runs.items()}
    return {"cases": cases, "ratios": ratios(runs), "trl": version("trl")}


def check(setting: Setting, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """The same tokens, and the same loss in every step."""
    own, other = (runs[case] for case in ("lora_kit", "trl"))
    assert own["tokens"] == other["tokens"], (own["tokens"], other["tokens"])
    for step, (mine, its) in enumerate(zip(own["losses"], other["losses"], strict=True), start=1):
        assert abs(mine - its) <= setting.bound * its, f"{setting.label}: step {step}: {mine} and {its}"


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians of a case over its rounds; its losses."""
    speeds = [run["tokens"] / run["training"] for run in runs]
    middle = {key: quartiles([run[key] for run in runs])[1] for key in ("training", "seconds", "bytes")}
    return {"tokens_per_second": quartiles(speeds)[1], **middle, "losses": runs[0]["losses"]}


def ratios(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, tuple[float, float, float]]:
    """lora_kit over TRL within each round, as quartiles: how many times the speed, what share of time and memory."""
    pairs = list(zip(runs["lora_kit"], runs["trl"], strict=True))
    return {
        "speed": quartiles([other["training"] / own["training"] for own, other in pairs]),
        "seconds": quartiles([own["seconds"] / other["seconds"] for own, other in pairs]),
        "bytes": quartiles([own["bytes"] / other["bytes"] for own, other in pairs]),
    }


def settings() -> list[Setting]:
    kinds = [Setting(dtype, vocabulary) for vocabulary in (4096, LARGE) for dtype in ("fp32", "bf16", "bf16 base")]
    long = [Setting(dtype, LARGE, long=True, steps=6) for dtype in ("fp32", "bf16")]
    return [*kinds, Setting(single=True), *long, Setting(vocabulary=LARGE, defaults=True)]


def rows() -> dict[str, Row]:
    quick = replace(Setting(), steps=3)
    found = {f"job of {quick.steps} steps, {quick.label}": Row(partial(compared, quick), "short only")}
    return found | {f"job, {setting.label}": Row(partial(compared, setting)) for setting in settings()}


def page(results: Mapping[str, Any]) -> str:
    head = ["", "", "tokens/s", "whole job", "memory", "loss, first → last"]
    lines = []
    for label, row in results.items():
        for case in CASES:
            run = row["cases"][case]
            losses = f"{run['losses'][0]:.4f} → {run['losses'][-1]:.4f}"
            cells = [f"{run['tokens_per_second']:,.0f}", f"{run['seconds']:.1f} s", f"{run['bytes'] / 1e6:,.0f} MB"]
            lines.append([label.removeprefix("job, ") if case == CASES[0] else "", case, *cells, losses])
        shares = row["ratios"]
        cells = [f"**{shares[key][1]:.2f} ×**" for key in ("speed", "seconds", "bytes")]
        lines.append(["", "lora_kit / trl", *cells, ""])
    versions = sorted({row["trl"] for row in results.values()})
    return f"{table(head, lines)}\n\nTRL {', '.join(versions)}; medians of three trainings each, ratios within a round."
