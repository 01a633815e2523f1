"""What a model costs: parameters, weight and KV bytes on a GPU, floating-point operations.

Only sizes, no weights: a `ModelSpec` is read from a Hugging Face `config.json` by
`placement.model_config`. Counts are exact for the matrices and include biases, norms and
embeddings, so that they agree with published parameter counts to better than 1 %.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallelism:
    """How one instance is cut: `tp` x `pp` x `attention_dp` GPUs.

    Attention is split over `tp` heads' groups and repeated `attention_dp` times; experts and
    dense MLPs are split over all `tp * attention_dp` GPUs of a stage, of which `ep` hold whole
    experts and the rest share an expert's columns. `ep` changes how tokens travel, not bytes.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    attention_dp: int = 1

    @property
    def num_gpus(self) -> int:
        return self.tp * self.pp * self.attention_dp

    @property
    def stage_gpus(self) -> int:
        return self.tp * self.attention_dp


ONE_GPU = Parallelism()


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    q_lora_rank: int  # 0: queries are not compressed
    kv_lora_rank: int
    nope_head_dim: int
    rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearAttention:
    """Layers with a fixed-size recurrent state in place of a KV cache (gated delta net)."""

    num_layers: int
    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int

    def state_bytes(self) -> int:
        """float32 state of one sequence over these layers."""
        per_layer = self.num_value_heads * self.key_head_dim * self.value_head_dim
        return 4 * per_layer * self.num_layers

    def num_params(self, hidden_size: int) -> int:
        """Projections of one layer: q, k, v, gate, output."""
        keys = self.num_key_heads * self.key_head_dim
        values = self.num_value_heads * self.value_head_dim
        return hidden_size * (2 * keys + 2 * values + 2 * self.num_value_heads) + values * (
            hidden_size
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The mixture-of-experts part; `num_dense_layers` layers come without it."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    num_dense_layers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Bytes of each kind of value; quantised weights count their scales."""

    linear_bytes: float = 2.0  # attention and dense MLP matrices
    expert_bytes: float = 2.0
    embedding_bytes: float = 2.0  # embeddings, LM head, norms, biases
    kv_bytes: float = 2.0
    linear_compute: str = "bfloat16"  # arithmetic of the dense GEMMs: bfloat16 | fp8 | fp4
    expert_compute: str = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shapes of a decoder-only transformer."""

    name: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position: int
    gated_mlp: bool = True
    tied_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    learned_positions: int = 0
    sliding_window: int | None = None
    num_sliding_layers: int = 0
    latent: LatentAttention | None = None
    linear: LinearAttention | None = None
    experts: Experts | None = None
    attention_gate: bool = False
    precision: Precision = Precision()

    # Layers by kind.

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.experts.num_dense_layers if self.experts else 0

    @property
    def num_dense_layers(self) -> int:
        return self.num_layers - self.num_moe_layers

    @property
    def num_linear_layers(self) -> int:
        return self.linear.num_layers if self.linear else 0

    @property
    def num_full_layers(self) -> int:
        """Layers that attend to the whole context."""
        return self.num_layers - self.num_sliding_layers - self.num_linear_layers

    # Parameters.

    @property
    def attention_params(self) -> int:
        """Of one softmax-attention layer."""
        if self.latent is not None:
            return self._latent_params(self.latent)
        query = self.num_heads * self.head_dim
        kv = 2 * self.num_kv_heads * self.head_dim
        gate = query if self.attention_gate else 0
        bias = (query + kv) if self.attention_bias else 0
        if self.attention_bias and not self.gated_mlp:
            bias += self.hidden_size  # OPT and GPT keep a bias on the output too
        return self.hidden_size * (query + gate + kv) + query * self.hidden_size + bias

    def _latent_params(self, latent: LatentAttention) -> int:
        qk_dim = latent.nope_head_dim + latent.rope_head_dim
        queries = self.num_heads * qk_dim
        if latent.q_lora_rank:
            query = self.hidden_size * latent.q_lora_rank + latent.q_lora_rank * queries
        else:
            query = self.hidden_size * queries
        down = self.hidden_size * (latent.kv_lora_rank + latent.rope_head_dim)
        up = latent.kv_lora_rank * self.num_heads * (latent.nope_head_dim + latent.v_head_dim)
        return query + down + up + self.num_heads * latent.v_head_dim * self.hidden_size

    @property
    def num_mlp_matrices(self) -> int:
        return 3 if self.gated_mlp else 2

    @property
    def dense_mlp_params(self) -> int:
        """Of one layer without experts."""
        bias = (self.intermediate_size + self.hidden_size) if self.mlp_bias else 0
        return self.num_mlp_matrices * self.hidden_size * self.intermediate_size + bias

    @property
    def expert_params(self) -> int:
        """Of one routed expert of one layer."""
        if self.experts is None:
            return 0
        return self.num_mlp_matrices * self.hidden_size * self.experts.intermediate_size

    @property
    def shared_expert_params(self) -> int:
        """Of one layer: the shared experts and the router."""
        if self.experts is None:
            return 0
        shared = self.num_mlp_matrices * self.hidden_size * self.experts.shared_intermediate_size
        return shared + self.hidden_size * self.experts.num_experts

    @property
    def embedding_params(self) -> int:
        return (self.vocab_size + self.learned_positions) * self.hidden_size

    @property
    def lm_head_params(self) -> int:
        """Separate output matrix; 0 when it is the embedding."""
        return 0 if self.tied_embeddings else self.vocab_size * self.hidden_size

    @property
    def norm_params(self) -> int:
        per_norm = self.hidden_size * (2 if not self.gated_mlp else 1)
        return per_norm * (2 * self.num_layers + 1)

    @property
    def num_params(self) -> int:
        return round(
            self._attention_total()
            + self._mlp_total(self.experts.num_experts if self.experts else 0)
            + self.embedding_params
            + self.lm_head_params
            + self.norm_params
        )

    def _attention_total(self) -> float:
        softmax = self.attention_params * (self.num_layers - self.num_linear_layers)
        linear = self.linear.num_params(self.hidden_size) if self.linear else 0
        return softmax + linear * self.num_linear_layers

    def _mlp_total(self, num_experts: float) -> float:
        dense = self.dense_mlp_params * self.num_dense_layers
        sparse = self.shared_expert_params + num_experts * self.expert_params
        return dense + sparse * self.num_moe_layers

    # Bytes.

    def kv_heads_per_gpu(self, tp: int) -> int:
        """KV heads that one rank holds; heads are repeated when there are fewer than ranks."""
        return max(1, -(-self.num_kv_heads // tp))

    def _kv_bytes_per_layer(self, tp: int) -> float:
        if self.latent is not None:  # the latent is shared by all heads, so every rank keeps it
            width = self.latent.kv_lora_rank + self.latent.rope_head_dim
        else:
            width = 2 * self.kv_heads_per_gpu(tp) * self.head_dim
        return width * self.precision.kv_bytes

    def kv_bytes_per_token(self) -> float:
        """Of the whole model without repetition: what a handoff moves for one token."""
        layers = self.num_full_layers + self.num_sliding_layers
        return self._kv_bytes_per_layer(1) * layers

    def kv_bytes(self, context_tokens: float) -> float:
        """KV of one sequence: sliding layers keep their window, linear layers their state."""
        window = min(context_tokens, self.sliding_window or context_tokens)
        state = self.linear.state_bytes() if self.linear else 0
        layers = self.num_full_layers * context_tokens + self.num_sliding_layers * window
        return self._kv_bytes_per_layer(1) * layers + state

    def kv_bytes_per_gpu_token(
        self, parallelism: Parallelism, *, is_windowed: bool = False
    ) -> float:
        """KV that one token takes on one GPU (the fullest stage).

        With `is_windowed` sliding layers are left out: their window is a constant, counted per
        sequence. Without, they keep all positions, as our engine does.
        """
        layers = self.num_full_layers + (0 if is_windowed else self.num_sliding_layers)
        layers = -(-layers // parallelism.pp)
        return self._kv_bytes_per_layer(parallelism.tp) * max(layers, 1)

    def weight_bytes(self, parallelism: Parallelism = ONE_GPU) -> float:
        """On one GPU of the fullest stage: the first and last stages share embedding and head.

        KV projections are repeated where ranks outnumber KV heads.
        """
        share = -(-self.num_layers // parallelism.pp) / self.num_layers
        tp, stage = parallelism.tp, parallelism.stage_gpus
        attention = self._attention_total() / tp + self._repeated_kv_params(tp)
        dense = self.dense_mlp_params * self.num_dense_layers / stage
        shared = self.shared_expert_params * self.num_moe_layers / tp
        num_experts = self.experts.num_experts if self.experts else 0
        routed = num_experts * self.expert_params * self.num_moe_layers / stage
        embedding = (self.embedding_params + self.lm_head_params) / tp
        if parallelism.pp > 1:
            embedding = max(self.embedding_params, self.vocab_size * self.hidden_size) / tp
        return (
            share * (attention + dense + shared) * self.precision.linear_bytes
            + share * routed * self.precision.expert_bytes
            + (embedding + share * self.norm_params) * self.precision.embedding_bytes
        )

    def _repeated_kv_params(self, tp: int) -> float:
        if self.latent is not None or tp <= self.num_kv_heads:
            return 0.0
        kv_columns = 2 * self.head_dim * (1 - self.num_kv_heads / tp)
        layers = self.num_layers - self.num_linear_layers
        return self.hidden_size * kv_columns * layers

    # Arithmetic.

    def attention_flops_per_pair(self) -> float:
        """QK^T and PV for one (token, attended token) pair over all softmax layers."""
        if self.latent is not None:
            qk = self.latent.nope_head_dim + self.latent.rope_head_dim
            width = qk + self.latent.v_head_dim
        else:
            width = 2 * self.head_dim
        return 2.0 * self.num_heads * width * (self.num_full_layers + self.num_sliding_layers)

    def fits(self, parallelism: Parallelism) -> str | None:
        """Why this cut is impossible for these shapes, or None."""
        if self.num_heads % parallelism.tp:
            return f"{self.num_heads} heads do not divide by TP {parallelism.tp}"
        if parallelism.pp > self.num_layers:
            return f"PP {parallelism.pp} is more than {self.num_layers} layers"
        if parallelism.ep > 1 and self.experts is None:
            return f"EP {parallelism.ep} needs a model with experts"
        if self.experts is not None and self.experts.num_experts % parallelism.ep:
            return f"{self.experts.num_experts} experts do not divide by EP {parallelism.ep}"
        return None

    def with_precision(self, precision: Precision) -> "ModelSpec":
        return replace(self, precision=precision)
