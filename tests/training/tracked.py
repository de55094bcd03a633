"""The peak that torch's own tracker finds for a Mixtral-8x7B layer stack under FSDP2, without devices or values.

python tracked.py PROCESSES LAYERS ROWS
"""

import sys

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, MixtralConfig

processes, layers, rows = map(int, sys.argv[1:])
dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
groups = processes // min(processes, 8)  # a layer's eight experts are divided among eight at most
mesh = init_device_mesh("cpu", (groups, processes // groups), mesh_dim_names=("replicate", "shard"))
mesh = mesh if groups > 1 else mesh["shard"]
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
with FakeTensorMode(allow_non_fake_inputs=True):
    model = AutoModelForCausalLM.from_config(MixtralConfig(num_hidden_layers=layers), dtype=torch.float32).train()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model.model.embed_tokens, mesh=mesh, mp_policy=policy)
    fully_shard([model.model.norm, model.lm_head], mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    ids = torch.zeros(rows, 1024, dtype=torch.long)
    tracker = FSDPMemTracker(model, optimizer)
    tracker.track_inputs((ids,))
    with tracker:
        for step in range(2):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 0:
                tracker.reset_mod_stats()  # the optimizer has no state before it
    found = {
        str(key).rpartition(".")[2]: value
        for key, value in tracker.get_tracker_snapshot("peak")[torch.device("cpu")].items()
    }
sys.stdout.write(f"{found['Total']}\n")
