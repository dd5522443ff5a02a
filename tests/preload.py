"""Imported once by the fork server of `tests.pool`; its processes are copies with these modules loaded."""

import opd_megatron

opd_megatron.silence_known_warnings()

import megatron.core.dist_checkpointing  # noqa: E402
import megatron.core.models.gpt  # noqa: E402
import megatron.core.optimizer  # noqa: E402
import transformers  # noqa: E402

import opd_megatron.training.job  # noqa: E402

__all__ = ["megatron", "opd_megatron", "transformers"]
