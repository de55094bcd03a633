"""Bytes of parameters and optimizer that this process holds after a step: a line of each process."""

import sys
from pathlib import Path

import torch

from upcycle.distributed import shards, world
from upcycle.weights.folders import load_dense

world.start()
model = load_dense(Path(sys.argv[1]), torch.float32, **shards.placement(int(sys.argv[2]), 1, 1)).train()
optimizer = torch.optim.AdamW(model.parameters())
ids = torch.arange(3, 67).view(2, 32)
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
states = (value for state in optimizer.state.values() for value in state.values())
held = [shards.local(tensor) for tensor in (*model.parameters(), *states)]
sys.stdout.write(f"{sum(tensor.nbytes for tensor in held)}\n")
world.wait()
world.stop()
