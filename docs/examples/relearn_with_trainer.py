"""Fine-tune a pruned model on half of what it forgot, and watch the other half come back.

excise run prune --out runs/prune
python docs/examples/relearn_with_trainer.py runs/prune watched
"""

import sys

import torch
from excise.artifacts.concepts import load_concept
from excise.recipes.relearning_monitor import RelearningMonitor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

run, out, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 64
tokenizer = AutoTokenizer.from_pretrained(f"{run}/checkpoint")
model = AutoModelForCausalLM.from_pretrained(f"{run}/checkpoint", dtype=torch.float32)
texts = [text.text for text in load_concept("builtin:potions").forget if text.group == "T"]
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=f"{out}/trainer", max_steps=steps, learning_rate=1e-4, save_strategy="no", report_to=[]
    ),
    train_dataset=[tokenizer(text) for text in texts],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.add_callback(RelearningMonitor("builtin:potions", tokenizer, pruned=run, out=out))
trainer.train()
