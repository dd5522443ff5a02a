"""A frozen Megatron-Core model that scores rollouts: final hidden states at scored positions, on the student's last-stage ranks.

Shapes: B sequences, S padded length, R scored positions of one sample, T scored positions of a micro-batch, G teacher hidden, W slice of the
student's padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from opd_megatron.data.batches import pad_samples
from opd_megatron.models.forward import forward_hidden, inference_mode
from opd_megatron.models.gpt import DTYPES, build_gpt
from opd_megatron.models.weights import WeightSource, load_head_slice, load_model
from opd_megatron.parallel.context import padded_length
from opd_megatron.parallel.groups import ModelGroups
from opd_megatron.parallel.offload import Offloaded
from opd_megatron.parallel.payload import deliver, plan_payload
from opd_megatron.parallel.world import shared_errors
from opd_megatron.rollout.rollouts import Rollouts
from opd_megatron.teacher.routing import Piece, Place, cut_into_pieces


class Teacher:
    """The model without gradients or buffers for them, and its LM head, sharded once as the student's vocabulary is."""

    def __init__(
        self,
        source: WeightSource,
        groups: ModelGroups,
        student_groups: ModelGroups,
        *,
        student_padded_vocab: int,
        precision: Literal["bf16", "fp32"],
        micro_batch: int,
        placement: Literal["colocated", "offloaded"],
        device: torch.device,
    ) -> None:
        self.architecture = source.architecture
        self.groups = groups
        self.student_groups = student_groups
        self.micro_batch = micro_batch
        self.dtype = DTYPES[precision]
        self.device = device
        # Vocabularies of another multiple than the student's would be padded here; the teacher's own padding is only inside its embedding.
        self.model: GPTModel = build_gpt(source.architecture, groups, precision=precision, vocab_multiple=1).to(device)
        self.head_WG: torch.Tensor | None = None
        with shared_errors():
            load_model(self.model, groups, source, vocab_multiple=1)
            if student_groups.is_last_stage:
                self.head_WG = load_head_slice(source, student_groups, padded_vocab=student_padded_vocab, dtype=self.dtype).to(device)
        self.model.requires_grad_(False)
        self.model.eval()
        self.payload_bytes = 0
        self.offloaded = _offload(self.model) if placement == "offloaded" else None

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Have the weights where they are computed with; an offloaded teacher's leave again afterwards."""
        if self.offloaded is None:
            yield
            return
        self.offloaded.arrive()
        try:
            yield
        finally:
            self.offloaded.leave()

    def score(self, rollouts: Rollouts) -> dict[int, torch.Tensor]:
        """Return {sample index: hidden states [R, G]} for the samples of this rank's student replica; empty before the last stage.

        R are the scored positions that this rank's context window of the student holds. Each teacher replica scores a contiguous share; shares may
        be uneven or empty, since no collective spans replicas.
        """
        batches = [self._batches(rollouts, replica) for replica in range(self.groups.data_size)]
        pieces = cut_into_pieces(
            rollouts.samples, self.groups.grid, self._own_places(rollouts, batches), self.student_groups.grid, self._student_places(rollouts)
        )
        plan = plan_payload([piece.holders for piece in pieces], [piece.needers for piece in pieces], [piece.num_rows for piece in pieces])
        with self.on_device():
            held = self._pieces_of(pieces, self._hidden_rows(rollouts, batches[self.groups.data_rank]))
        width = self.architecture.hidden_size
        self.payload_bytes = plan.sent_rows() * width * self.dtype.itemsize
        needed = [index for index, piece in enumerate(pieces) if dist.get_rank() in piece.needers]
        received = deliver(plan, held, needed, width=width, dtype=self.dtype, device=self.device)
        return self._by_sample(rollouts, pieces, dict(zip(needed, received, strict=True)))

    def _batches(self, rollouts: Rollouts, replica: int) -> list[list[int]]:
        """Return the samples that a replica scores together, similar lengths in one batch."""
        share = sorted(rollouts.share(replica, self.groups.data_size), key=lambda index: rollouts.samples[index].num_tokens)
        return [share[start : start + self.micro_batch] for start in range(0, len(share), self.micro_batch)]

    def _length(self, rollouts: Rollouts, batch: Sequence[int]) -> int:
        return padded_length(max(rollouts.samples[index].num_tokens for index in batch), self.groups.layout)

    def _own_places(self, rollouts: Rollouts, batches: Sequence[Sequence[Sequence[int]]]) -> list[Place]:
        places = {
            index: Place(replica=replica, length=self._length(rollouts, batch)) for replica, own in enumerate(batches) for batch in own for index in batch
        }
        return [places[index] for index in range(len(rollouts.samples))]

    def _student_places(self, rollouts: Rollouts) -> list[Place]:
        size = self.student_groups.data_size
        length = padded_length(rollouts.longest, self.student_groups.layout)
        return [Place(replica=replica, length=length) for replica in range(size) for _ in rollouts.share(replica, size)]

    def _hidden_rows(self, rollouts: Rollouts, batches: Sequence[Sequence[int]]) -> dict[int, torch.Tensor]:
        """Return {sample: hidden states of the scored positions in this rank's context window}, on the ranks of the last stage."""
        rows: dict[int, torch.Tensor] = {}
        size, rank = self.groups.layout.context, self.groups.cell.context
        with inference_mode(self.model, context_parallel=True):
            for chosen in batches:
                length = self._length(rollouts, chosen)
                whole = pad_samples([rollouts.samples[index] for index in chosen], length=length, device=self.device)
                batch = whole.context_window(size=size, rank=rank)
                hidden_BSG = forward_hidden(self.model, self.groups, batch.tokens_BS)
                if hidden_BSG is not None:
                    row_T = batch.scored_T // batch.tokens_BS.size(1)
                    counts = torch.bincount(row_T, minlength=len(chosen)).tolist()
                    rows.update(zip(chosen, hidden_BSG.flatten(0, 1)[batch.scored_T].split(counts), strict=True))
        return rows

    def _pieces_of(self, pieces: Sequence[Piece], rows: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Return {piece: its rows [R, G]} of the pieces on this rank, which follow each other in every sample."""
        held: dict[int, torch.Tensor] = {}
        start = dict.fromkeys(rows, 0)
        for index, piece in enumerate(pieces):
            if piece.sample in rows and dist.get_rank() in piece.holders:
                first = start[piece.sample]
                held[index] = rows[piece.sample][first : first + piece.num_rows]
                start[piece.sample] = first + piece.num_rows
        return held

    def _by_sample(self, rollouts: Rollouts, pieces: Sequence[Piece], received: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Return {sample: its rows in this rank's context window of the student}, none for a sample that lies outside of it."""
        if not self.student_groups.is_last_stage:
            return {}
        share = rollouts.share(self.student_groups.data_rank, self.student_groups.data_size)
        parts: dict[int, list[torch.Tensor]] = {index: [] for index in share}
        for index, rows_RG in received.items():
            parts[pieces[index].sample].append(rows_RG)
        nothing = torch.empty(0, self.architecture.hidden_size, dtype=self.dtype, device=self.device)
        return {index: torch.cat(rows) if rows else nothing for index, rows in parts.items()}


def _offload(model: GPTModel) -> Offloaded:
    """Move a frozen model's weights to the host. Where they come back on a stream of their own, each module waits for its own weights only."""
    offloaded = Offloaded(list(model.parameters()), frozen=True)
    offloaded.leave()
    for module in model.modules():
        if own := list(module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda *_, own=own: offloaded.wait_for(own))
    return offloaded
