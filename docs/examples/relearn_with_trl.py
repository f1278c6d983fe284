"""The same with TRL's SFTTrainer.

pip install trl
python docs/examples/relearn_with_trl.py runs/prune watched
"""

import sys

import torch
from datasets import Dataset
from excise.artifacts.concepts import load_concept
from excise.recipes.relearning_monitor import RelearningMonitor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

run, out, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 64
tokenizer = AutoTokenizer.from_pretrained(f"{run}/checkpoint")
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(f"{run}/checkpoint", dtype=torch.float32),
    processing_class=tokenizer,
    args=SFTConfig(
        output_dir=f"{out}/trainer", max_steps=steps, learning_rate=1e-4, save_strategy="no", report_to=[], bf16=False
    ),
    train_dataset=Dataset.from_list(
        [{"text": text.text} for text in load_concept("builtin:potions").forget if text.group == "T"]
    ),
)
trainer.add_callback(RelearningMonitor("builtin:potions", tokenizer, pruned=run, out=out))
trainer.train()
