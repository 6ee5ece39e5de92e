"""Train an adapter on with TRL: `train_with_trl.py BASE ADAPTER ROWS OUT STEPS`."""

import sys

import datasets
import peft
import torch
import transformers
import trl

base, adapter, rows, out, steps = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(base)
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
settings = trl.SFTConfig(
    out,
    max_steps=int(steps),
    learning_rate=1e-2,
    per_device_train_batch_size=4,
    report_to="none",
    save_strategy="no",
    bf16=False,
    gradient_checkpointing=False,
    use_cpu=True,
)
table = datasets.load_dataset("json", data_files=rows, split="train")
trainer = trl.SFTTrainer(model=model, args=settings, train_dataset=table, processing_class=tokenizer)
trainer.train()
trainer.save_model(out)
