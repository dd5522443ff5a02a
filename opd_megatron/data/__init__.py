"""Prompts in: sources, the held-out split, tokenization, and an order that resumes without state."""

from opd_megatron.data.prompts import Prompt, PromptSet, load_prompts, response_ids, with_targets
from opd_megatron.data.tokenizer import check_same_tokenizer, load_tokenizer

__all__ = ["Prompt", "PromptSet", "check_same_tokenizer", "load_prompts", "load_tokenizer", "response_ids", "with_targets"]
