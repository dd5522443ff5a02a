"""Alignment of two tokenizers: the bytes of tokens, the units of text that both can write, and the tokens they share."""

from opd_megatron.align.pieces import BytePieces, EncodedText, check_lossless, token_bytes
from opd_megatron.align.units import Unit, coarsen_to_anchors, common_boundaries, common_prefix, minimal_aligned_units, released_units, units_between
from opd_megatron.align.vocabulary import SharedVocabulary, shared_vocabulary

__all__ = [
    "BytePieces",
    "EncodedText",
    "SharedVocabulary",
    "Unit",
    "check_lossless",
    "coarsen_to_anchors",
    "common_boundaries",
    "common_prefix",
    "minimal_aligned_units",
    "released_units",
    "shared_vocabulary",
    "token_bytes",
    "units_between",
]
