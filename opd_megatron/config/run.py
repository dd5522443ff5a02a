"""What a run is: one frozen dataclass per concern, each checking its own values. Standard library only."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from opd_megatron.config.alignment import AlignmentConfig
from opd_megatron.config.checks import require
from opd_megatron.config.data import DataConfig, PrivilegedConfig
from opd_megatron.config.effopd import EffOPDConfig
from opd_megatron.config.loss import ImportanceConfig, LossConfig, PositionWeightsConfig
from opd_megatron.config.models import ParallelLayout, StudentConfig, TeacherConfig
from opd_megatron.config.modules import ModulesConfig
from opd_megatron.config.tracking import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How the student writes. `record` keeps every rollout in the run directory; `replay` names a run whose rollouts are used instead of sampling."""

    max_response_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    samples_per_prompt: int = 1
    # Sequences decoded together by one replica; bounds the KV cache.
    batch_sequences: int = 256
    # static: batches are decoded to the end of their longest response, on any machine. dynamic: finished sequences make room for waiting ones, over
    # Megatron-Core's paged cache and flash-attention on GPUs. auto: dynamic where machine and model allow it.
    engine: Literal["auto", "static", "dynamic"] = "auto"
    # dynamic: what the pages of one rank may take; null takes what batch_sequences of the longest sequences fill, so that none of them waits.
    kv_cache_gib: float | None = None
    # dynamic: record decoding steps as CUDA graphs, anew in each rollout. Off until a run on GPUs has shown that it pays.
    cuda_graphs: bool = False
    # The student writes in this layout, by a copy of its weights on the same ranks that is there while it writes; null writes with the weights as they lie.
    layout: ParallelLayout | None = None
    record: bool = False
    replay: str | None = None

    def __post_init__(self) -> None:
        require(self.max_response_tokens >= 1, f"rollout.max_response_tokens={self.max_response_tokens} must be at least 1")
        require(0 <= self.temperature < math.inf, f"rollout.temperature={self.temperature} must not be negative or infinite; 0 is greedy")
        require(0 < self.top_p <= 1, f"rollout.top_p={self.top_p} must be in (0, 1]")
        require(self.top_k >= 0, f"rollout.top_k={self.top_k} must not be negative; 0 keeps the whole vocabulary")
        require(self.samples_per_prompt >= 1, f"rollout.samples_per_prompt={self.samples_per_prompt} must be at least 1")
        require(self.batch_sequences >= 1, f"rollout.batch_sequences={self.batch_sequences} must be at least 1")
        budget = self.kv_cache_gib
        require(budget is None or 0 < budget < math.inf, f"rollout.kv_cache_gib={budget} must be a positive number, or null for rollout.batch_sequences' need")
        for key, chosen in (("kv_cache_gib", budget), ("cuda_graphs", self.cuda_graphs or None)):
            way_out = f"use rollout.engine=dynamic, or set it to {'null' if key == 'kv_cache_gib' else 'false'}"
            require(self.engine != "static" or chosen is None, f"rollout.{key}={_as_word(chosen)} is without effect under rollout.engine=static; {way_out}")
        if self.layout is None:
            return
        for axis, size in (("virtual", self.layout.virtual), ("context", self.layout.context)):
            why = "shortens the bubbles of a backward" if axis == "virtual" else "cuts sequences, and a decoding step has one position"
            require(size == 1, f"rollout.layout.{axis}={size} is of no use: it {why}; set it to 1")
        require(not self.layout.sequence, "rollout.layout.sequence=true is of no use: a decoding step has one position; set it to false")


def fp8_multiple(scaling: str | None) -> int:
    """Return what the tokens of a product on a rank, and the sides of its weight there, must be multiples of: `get_fp8_align_size` of Megatron-Core."""
    return {None: 1, "mxfp8": 32}.get(scaling, 16)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How the student is updated. `opd` learns from the teacher on its own rollouts; `sft` from the reference answers."""

    objective: Literal["opd", "sft"] = "opd"
    steps: int = 100
    # Sequences of one micro-batch, padded to the longest of the step.
    micro_batch: int = 1
    # Pack sequences into micro-batches of at most this many tokens, evenly filled, in place of padding; null packs nothing.
    micro_batch_tokens: int | None = None
    learning_rate: float = 1e-6
    min_learning_rate: float = 0.0
    warmup_steps: int = 0
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    clip_grad: float = 1.0
    precision: Literal["bf16", "fp32"] = "bf16"
    # Layers of both models: Transformer Engine's, or Megatron-Core's local ones with our attention; auto takes the first where the package works.
    layers: Literal["auto", "te", "local"] = "auto"
    # The scaling of 8-bit floats (Megatron's fp8_recipe) in the products of the student's layers while it trains; needs Transformer Engine's layers and bf16.
    # Null because it changes the numbers, and what it saves is nowhere measured yet.
    fp8: Literal["tensorwise", "blockwise", "mxfp8"] | None = None
    # Whether the product that makes a weight's gradient adds it to the buffer by itself: Transformer Engine's layers can, local ones with a kernel of Apex.
    # auto does where it can: the sum is the same, one pass over the gradients shorter.
    gradient_accumulation_fusion: Literal["auto", "on", "off"] = "auto"
    # Send gradients to the other replicas while the backward of the last micro-batch goes on. Off because a run of one replica, or of many micro-batches,
    # gains little; the sums are the same.
    overlap_grad_reduce: bool = False
    # full: keep the inputs of layers only, and compute each layer again in the backward (Megatron's uniform recomputation). selective: the modules below alone.
    recompute: Literal["none", "selective", "full"] = "none"
    # With recompute=selective. The feed-forward, dense (mlp) or of experts (moe), holds most of what a layer keeps; attention and its messages between context
    # ranks are left as they are. layernorm and moe_act need Transformer Engine's layers.
    recompute_modules: tuple[Literal["core_attn", "layernorm", "mlp", "moe", "moe_act"], ...] = ("mlp", "moe")
    # Keep optimizer state on the host, and no gradient buffers, while the student writes and the teacher scores.
    offload_optimizer: bool = False
    # With GPUs, refuse at start what is planned to need more memory than they have free: before weights are read, and not an hour later. The plan has every
    # prompt and response at its limit; a run whose responses stay shorter may begin with false.
    check_memory: bool = True
    # A step whose loss or gradient is not finite changes nothing; this many in a row end the run.
    max_skipped_steps: int = 5
    # A rank that is in one phase of a step, one save or one evaluation for longer ends the run, and all ranks write where they stand; 0 waits for ever.
    watchdog_seconds: float = 1800.0
    # What one GPU can do in 1e12 operations a second, for model_flop_utilization; null knows NVIDIA's data centre GPUs from A100 on, in bf16.
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"training.steps={self.steps} must be at least 1")
        require(self.micro_batch >= 1, f"training.micro_batch={self.micro_batch} must be at least 1")
        limit = self.micro_batch_tokens
        require(limit is None or limit >= 1, f"training.micro_batch_tokens={limit} must be at least 1, or null for no packing")
        require(
            limit is None or self.micro_batch == 1,
            f"training.micro_batch={self.micro_batch} is without effect under training.micro_batch_tokens; leave it at 1",
        )
        require(math.isfinite(self.learning_rate) and self.learning_rate > 0, f"training.learning_rate={self.learning_rate} must be positive")
        require(
            0 <= self.min_learning_rate <= self.learning_rate,
            f"training.min_learning_rate={self.min_learning_rate} must lie between 0 and learning_rate={self.learning_rate}",
        )
        require(0 <= self.weight_decay < math.inf, f"training.weight_decay={self.weight_decay} must be a finite number, not negative")
        for name, beta in (("adam_beta1", self.adam_beta1), ("adam_beta2", self.adam_beta2)):
            require(0 <= beta < 1, f"training.{name}={beta} must be in [0, 1)")
        self._check_layers()
        require(self.warmup_steps >= 0, f"training.warmup_steps={self.warmup_steps} must not be negative")
        require(self.clip_grad >= 0, f"training.clip_grad={self.clip_grad} must not be negative; 0 turns clipping off")
        require(
            0 <= self.watchdog_seconds < math.inf, f"training.watchdog_seconds={self.watchdog_seconds} must be a finite number, not negative; 0 turns it off"
        )
        peak = self.peak_tflops
        require(peak is None or 0 < peak < math.inf, f"training.peak_tflops={peak} must be a positive number, or null for what is known of the GPU")
        require(self.max_skipped_steps >= 1, f"training.max_skipped_steps={self.max_skipped_steps} must be at least 1")

    @property
    def recomputed_modules(self) -> tuple[str, ...]:
        """The parts of layers that are computed again; none where whole layers are, or nothing is."""
        return self.recompute_modules if self.recompute == "selective" else ()

    def _check_layers(self) -> None:
        """Raise ValueError for layers that no machine has."""
        if self.fp8 is not None:
            require(self.layers != "local", f"training.fp8={self.fp8} needs Transformer Engine's layers; set training.layers=te, or fp8=null")
            require(self.precision == "bf16", f"training.fp8={self.fp8} needs training.precision=bf16, not {self.precision}; change one of them")
        if self.recompute == "selective":
            modules = self.recompute_modules
            require(bool(modules), "training.recompute_modules is empty: name modules, or set training.recompute=none")
            require(len(set(modules)) == len(modules), f"training.recompute_modules={','.join(modules)} names a module twice; name each once")
            for module in ("layernorm", "moe_act"):
                require(
                    module not in modules or self.layers != "local",
                    f"training.recompute_modules has {module}, which needs Transformer Engine's layers; leave it out, or set training.layers=te",
                )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved; 0 saves only at the end and on a stop signal. `resume` continues a run directory."""

    every_steps: int = 0
    keep: int = 2
    # Go on with the next steps while a checkpoint is written; takes as much host memory as the rank's share of it.
    in_background: bool = True
    resume: bool = True

    def __post_init__(self) -> None:
        require(self.every_steps >= 0, f"checkpoint.every_steps={self.every_steps} must not be negative")
        require(self.keep >= 1, f"checkpoint.keep={self.keep} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Accuracy on held-out prompts before, during (`every_steps`, 0 for never) and after training.

    `prompts` is how many held-out prompts of `data.prompts` are used, or a source of its own, named as `data.prompts` is.
    """

    every_steps: int = 0
    prompts: int | str = 512
    samples_per_prompt: int = 1
    temperature: float = 0.0
    max_response_tokens: int | None = None
    # Also measure the teacher, once, so that accuracy can be read against it.
    teacher: bool = True

    def __post_init__(self) -> None:
        require(self.every_steps >= 0, f"evaluation.every_steps={self.every_steps} must not be negative")
        require(not isinstance(self.prompts, int) or self.prompts >= 0, f"evaluation.prompts={self.prompts} must not be negative; 0 turns evaluation off")
        require(self.samples_per_prompt >= 1, f"evaluation.samples_per_prompt={self.samples_per_prompt} must be at least 1")
        require(0 <= self.temperature < math.inf, f"evaluation.temperature={self.temperature} must not be negative or infinite; 0 is greedy")
        require(self.prompts != "", "evaluation.prompts is empty; give a number, a source, or 0 for no evaluation")
        limit = self.max_response_tokens
        require(limit is None or limit >= 1, f"evaluation.max_response_tokens={limit} must be at least 1, or null for the rollout's")
        require(
            self.samples_per_prompt == 1 or self.temperature > 0,
            f"evaluation.samples_per_prompt={self.samples_per_prompt} greedy samples would all be equal; set evaluation.temperature",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One complete run. `world_size` is the number of ranks (GPUs) the recipe was written for."""

    world_size: int = 1
    seed: int = 1234
    student: StudentConfig
    teacher: TeacherConfig | None = None
    data: DataConfig
    privileged: PrivilegedConfig = field(default_factory=PrivilegedConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    position_weights: PositionWeightsConfig = field(default_factory=PositionWeightsConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    modules: ModulesConfig = field(default_factory=ModulesConfig)
    effopd: EffOPDConfig = field(default_factory=EffOPDConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        most, limit = 2**22, self.training.micro_batch_tokens
        require(
            self.num_sequences <= most,
            f"data.batch_prompts * rollout.samples_per_prompt = {self.num_sequences} sequences a step are more than {most}; lower one of them",
        )
        require(limit is None or limit < 2**31, f"training.micro_batch_tokens={limit} must be below 2**31, or null for no packing")
        require(1 <= self.world_size <= 2**20, f"world_size={self.world_size} must be at least 1, and at most {2**20}")
        require(abs(self.seed) < 2**63, f"seed={self.seed} must fit into 64 bits")
        self._check_effopd()
        if self.training.objective == "opd":
            require(
                self.teacher is not None,
                "training.objective=opd needs a teacher; set teacher.hf, teacher.checkpoint or teacher.weights, or use training.objective=sft",
            )
            require(
                self.rollout.temperature > 0 or bool(self.rollout.replay),
                "rollout.temperature=0 would train on greedy text only; on-policy rollouts need a positive temperature",
            )
            limit, multiple = self.training.micro_batch_tokens, self.student.layout.row_multiple * fp8_multiple(self.training.fp8)
            longest = -(-(self.data.max_prompt_tokens + self.rollout.max_response_tokens) // multiple) * multiple
            require(
                limit is None or longest <= limit,
                f"training.micro_batch_tokens={limit} does not hold one sequence of data.max_prompt_tokens + rollout.max_response_tokens = {longest} tokens; "
                "raise it, or shorten one of them",
            )
            self._check_alignment()
        else:
            for key, chosen, plain in (
                ("privileged.template", self.privileged.template, None),
                ("alignment.kind", self.alignment.kind, "identity"),
                ("importance.rule", self.importance.rule, "all"),
                ("position_weights.enabled", self.position_weights.enabled, False),
                ("loss.reduction", self.loss.reduction, "auto"),
                ("loss.denominator", self.loss.denominator, "kept"),
            ):
                require(chosen == plain, f"{key}={_as_word(chosen)} needs training.objective=opd, not {self.training.objective}; set it to {_as_word(plain)}")

    def _check_effopd(self) -> None:
        """Raise ValueError for searches that this run cannot make."""
        if not self.effopd.enabled:
            return
        steps = self.effopd.trigger_steps
        require(
            steps is None or steps[0] <= self.training.steps,
            f"effopd.trigger_steps={steps} are all beyond training.steps={self.training.steps}; name earlier ones, or null for 1, 2, 4, 8, ...",
        )
        require(
            isinstance(self.effopd.prompts, int) or self.effopd.prompts != self.evaluation.prompts,
            f"effopd.prompts={self.effopd.prompts!r} is what evaluation.prompts names: weights would be chosen by what measures them; name another source",
        )
        if self.effopd.score != "divergence":
            return
        require(self.training.objective == "opd", f"effopd.score=divergence needs training.objective=opd, not {self.training.objective}; set it to accuracy")
        require(
            self.teacher is None or self.teacher.staleness == 0,
            "effopd.score=divergence needs the teacher between two batches, and teacher.staleness=1 has one under way then; set either to another value",
        )

    def _check_alignment(self) -> None:
        """Raise ValueError for what has no meaning where student and teacher read other tokens."""
        kind = self.alignment.kind
        if self.alignment.is_identity:
            return
        assert self.teacher is not None
        loss, importance = self.loss, self.importance
        kinds = ("reverse_kl",) if kind == "uld" else ("reverse_kl", "forward_kl")
        way_out = "set it to reverse_kl: uld has a loss of its own" if kind == "uld" else f"use {' or '.join(kinds)}"
        require(loss.kind in kinds, f"loss.kind={loss.kind} has no form with alignment.kind={kind}; {way_out}")
        require(loss.pointwise_clip is None, f"loss.pointwise_clip={loss.pointwise_clip} has no form with alignment.kind={kind}; set it to null")
        require(importance.rule == "all", f"importance.rule={importance.rule} scores tokens, and alignment.kind={kind} compares units; set it to all")
        require(
            not self.teacher.is_student,
            f"teacher.weights={self.teacher.weights} is the student itself, with its own tokenizer: set alignment.kind=identity",
        )

    @property
    def reduction(self) -> Literal["token", "sequence"]:
        """How the losses of the tokens become one, after `loss.reduction=auto` was decided."""
        if self.loss.reduction != "auto":
            return self.loss.reduction
        return "sequence" if self.position_weights.enabled else "token"

    @property
    def scoring_teacher(self) -> TeacherConfig | None:
        """The teacher, where the objective has one; supervised fine-tuning may name the teacher of the run that follows."""
        return self.teacher if self.training.objective == "opd" else None

    @property
    def teacher_source(self) -> StudentConfig | TeacherConfig | None:
        """The teacher's layout, and the folder of the weights that it begins with: the student's, where it is the student itself."""
        teacher = self.scoring_teacher
        return replace(self.student, layout=teacher.layout) if teacher is not None and teacher.is_student else teacher

    @property
    def copy_layout(self) -> ParallelLayout | None:
        """The layout of the student's copy that writes; None where its own weights do, which write without sequence parallelism anyway."""
        return self.rollout.layout if self.rollout.layout != replace(self.student.layout, sequence=False) else None

    @property
    def writing_layout(self) -> ParallelLayout:
        """The layout in which the student writes."""
        return self.copy_layout or self.student.layout

    @property
    def num_sequences(self) -> int:
        """Sequences of one optimizer step."""
        return self.data.batch_prompts * (self.rollout.samples_per_prompt if self.training.objective == "opd" else 1)

    @property
    def num_teacher_ranks(self) -> int:
        """Ranks that hold the teacher and nothing of the student."""
        return (self.scoring_teacher.num_ranks or 0) if self.scoring_teacher is not None else 0

    def check_world(self, world_size: int) -> None:
        """Raise ValueError unless both layouts fit `world_size` ranks."""
        own = self.num_teacher_ranks
        require(own < world_size, f"teacher.num_ranks={own} leaves none of world_size={world_size} ranks to the student; use fewer, or more ranks in all")
        for role, model in (("student", self.student), ("rollout", self.rollout), ("teacher", self.teacher)):
            if model is not None and model.layout is not None:
                model.layout.check_ranks(role, own or world_size if role == "teacher" else world_size - own)

    def to_json(self) -> dict[str, Any]:
        """Return the resolved configuration as plain JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


def _as_word(value: str | bool | float | None) -> str:
    """Return a value as it is written on the command line."""
    return value if isinstance(value, str) else "null" if value is None else str(value).lower()
