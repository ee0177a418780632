"""One of two processes that generate together: with "tensor" they hold one model between them, else a copy each."""

from __future__ import annotations

import sys
import warnings

import torch
import torch.distributed as dist
import transformers

import melodi_otel
from melodi_otel.instrumentation.transformers.parallel import spread

folder, how = sys.argv[1:]
torch.set_num_threads(1)
runtime = melodi_otel.instrument()
dist.init_process_group("gloo")
given = {}
if how == "tensor":
    warnings.simplefilter(
        "ignore"
    )  # 5.x takes tp_plan and says that it will be called otherwise; 4.57 knows nothing else
    given = {"tp_plan": "auto"}
model = transformers.AutoModelForCausalLM.from_pretrained(folder, **given)
model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=6, do_sample=False)
print("spread", spread(model))
melodi_otel.uninstrument()
dist.destroy_process_group()
