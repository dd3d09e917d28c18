"""Growth under the Trainer of transformers: a callback.   python examples/loop_transformers.py"""
import argparse
import inspect

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import esper
from esper.integrations.transformers import EsperCallback

text = torch.tensor(list(inspect.getsource(argparse).encode()))  # Python's own words
rows = [{"input_ids": ids, "labels": ids} for ids in text[:32_000].view(-1, 64)]
held = torch.stack([row["input_ids"] for row in rows[450:]])
model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=32, n_head=2, n_layer=2, n_positions=64))
esper.wrap(model, sites=["transformer.h.*"], example=held[:2], causal=True)  # looks not ahead
with esper.SlowTrack("library"):
    growth = EsperCallback(holdout=[{"input_ids": held, "labels": held}],
                           library=esper.open_library("library"), observers=[print])
    Trainer(model, TrainingArguments("runs/gpt2", num_train_epochs=400, report_to=[],
                                     per_device_train_batch_size=32, learning_rate=1e-3),
            train_dataset=rows[:450], callbacks=[growth]).train()
