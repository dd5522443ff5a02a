"""Imported once by the fork server of `tests.pool` and `tests.programs`; its processes are copies with these modules loaded."""

import gc

import opd_megatron

opd_megatron.import_megatron()

import megatron.core.dist_checkpointing  # noqa: E402
import megatron.core.models.gpt  # noqa: E402
import megatron.core.optimizer  # noqa: E402
import torch._dynamo  # noqa: E402
import torch.utils.tensorboard  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import opd_megatron.reporting.report  # noqa: E402
import opd_megatron.training.job  # noqa: E402
import tests.tiny  # noqa: E402

# The copies share what is here with the server as long as nobody writes to it, and garbage collection does.
gc.freeze()

__all__ = ["AutoModelForCausalLM", "AutoTokenizer", "megatron", "opd_megatron", "tests", "torch"]
