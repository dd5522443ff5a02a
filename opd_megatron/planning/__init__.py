"""What a run will need, before there is a GPU or a weight: memory per rank and messages per step. Planned, not measured."""

from opd_megatron.planning.memory import RankMemory, Term
from opd_megatron.planning.messages import Message
from opd_megatron.planning.plan import Plan, make_plan
from opd_megatron.planning.remedies import Catalogue, shortfall
from opd_megatron.planning.text import as_json, as_text

__all__ = ["Catalogue", "Message", "Plan", "RankMemory", "Term", "as_json", "as_text", "make_plan", "shortfall"]
