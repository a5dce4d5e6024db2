"""Done once in the fork server of `tests.multiprocess`, so that no child does it again.

The first tokenizer of a process takes 0.3 s, and the first model 0.3 s, in which torch loads its
shape functions.
"""

import torch

import models
from loaders import tokenizers
from tests.engine import tiny

torch.set_num_threads(1)  # threads do not survive a fork
tokenizers.build()
models.build(tiny.MODEL)
