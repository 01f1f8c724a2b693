"""The routers of the shared test matrix. To enter a router: one row here.

tests/layer/test_router_matrix.py runs every row through what all routers must hold, tests/hf/test_router_models.py
through what models with that router must hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

N, D, B, LENGTH, VOCABULARY = 8, 6, 4, 5, 11
MODALITIES, TASKS = 2, 3


class Row(NamedTuple):
    """A router config, as the `router` section of a spec.

    Attributes:
        values: the section.
        unreached: parameters that the combine weights send no gradient to, with the reason.
        balanced: the load-balancing loss has no gradient, because of the reason given.
    """

    values: dict[str, Any]
    unreached: Mapping[str, str] = {}
    balanced: str = ""


UNUSED_STATE = {"cell.weight_hh": "the first layer starts from a state of zeros"}

ROUTERS: dict[str, Row] = {
    "softmax": Row({"type": "top_k", "top_k": 3}),
    "softmax_renormalised": Row({"type": "top_k", "top_k": 3, "normalize_top_k": True}),
    "softmax_over_selected": Row({"type": "top_k", "top_k": 3, "softmax_over": "selected", "linear_bias": True}),
    "top_1": Row({"type": "top_k", "top_k": 1}),
    "all_experts": Row({"type": "top_k", "top_k": 8}, balanced="every token picks every expert"),
    "device_ties": Row({"type": "top_k", "top_k": 3, "stable_ties": False}),
    "deepseek_v2": Row({"type": "top_k", "top_k": 3, "num_groups": 4, "top_k_groups": 2, "scaling_factor": 16.0}),
    "deepseek_v3": Row(
        {
            "type": "top_k",
            "top_k": 3,
            "score_function": "sigmoid",
            "selection_bias": True,
            "normalize_top_k": True,
            "normalization_epsilon": 1e-20,
            "scaling_factor": 2.5,
            "num_groups": 4,
            "top_k_groups": 2,
            "group_score": "top2_sum",
        }
    ),
    "zero_mask": Row(
        {
            "type": "top_k",
            "top_k": 3,
            "selection_bias": True,
            "num_groups": 4,
            "top_k_groups": 2,
            "group_mask_value": "zero",
        }
    ),
    "sqrt_softplus": Row({"type": "top_k", "top_k": 3, "score_function": "sqrt_softplus", "selection_bias": True}),
    "input_jitter": Row({"type": "top_k", "top_k": 3, "input_jitter": 0.5}),
    "selected_by_logits": Row(
        {
            "type": "top_k",
            "top_k": 3,
            "score_function": "sigmoid",
            "selection_bias": True,
            "select_by": "logits",
            "logit_softcap": 2.0,
            "logit_scale": 0.5,
            "normalize_top_k": True,
            "normalization_order": 2.0,
            "normalization_floor": 1e-12,
        }
    ),
    "learned_scales": Row(
        {
            "type": "top_k",
            "top_k": 3,
            "input_norm": True,
            "input_scale": True,
            "normalize_top_k": True,
            "expert_scale": True,
        }
    ),
    "dense": Row({"type": "dense"}, balanced="every token runs every expert"),
    "dense_evaluated_sparsely": Row(
        {"type": "dense", "evaluation_top_k": 2, "score_function": "sigmoid", "linear_bias": True},
        balanced="in training every token runs every expert",
    ),
    "hash_random": Row({"type": "hash", "vocabulary_size": VOCABULARY, "top_k": 2}),
    "hash_balanced": Row({"type": "hash", "vocabulary_size": VOCABULARY, "table": "balanced", "frequencies": "zipf"}),
    "hash_ngram": Row({"type": "hash", "vocabulary_size": VOCABULARY, "table": "ngram", "ngram_length": 3, "top_k": 2}),
    "hash_domains": Row({"type": "hash", "vocabulary_size": VOCABULARY, "num_domains": 4, "top_k": 2}),
    "hash_deepseek_v4": Row(
        {
            "type": "hash",
            "vocabulary_size": VOCABULARY,
            "top_k": 3,
            "table": "stored",
            "weights": "scores",
            "score_function": "sqrt_softplus",
            "normalize_top_k": True,
            "normalization_epsilon": 1e-20,
            "scaling_factor": 1.5,
        }
    ),
    "sentence": Row({"type": "sentence", "top_k": 2}),
    "sentence_prefix": Row({"type": "sentence", "top_k": 2, "pool": "prefix", "normalize_top_k": True}),
    "sentence_first": Row({"type": "sentence", "top_k": 3, "pool": "first", "score_function": "sigmoid"}),
    "task_gates": Row({"type": "task", "num_tasks": TASKS, "top_k": 2}),
    "task_gates_dense": Row(
        {"type": "task", "num_tasks": TASKS, "top_k": N}, balanced="every token picks every expert"
    ),
    "task_embedding": Row({"type": "task", "num_tasks": TASKS, "top_k": 2, "kind": "embedding"}),
    "task_embedding_added": Row(
        {
            "type": "task",
            "num_tasks": TASKS,
            "top_k": 3,
            "kind": "embedding",
            "embedding_input": "add",
            "score_function": "sigmoid",
            "normalize_top_k": True,
        }
    ),
    "task_fixed": Row({"type": "task", "num_tasks": TASKS, "kind": "fixed", "experts": [[0, 7], [2], [1, 2, 3]]}),
    "task_split": Row({"type": "task", "num_tasks": 4, "kind": "fixed"}),
    "modality": Row({"type": "modality", "banks": [5, 3], "top_k": 2}),
    "modality_shared": Row(
        {
            "type": "modality",
            "banks": [2, 3],
            "shared": 3,
            "top_k": 4,
            "score_function": "sigmoid",
            "selection_bias": True,
            "normalize_top_k": True,
            "normalization_floor": 1e-12,
            "scaling_factor": 2.0,
        }
    ),
    "random": Row({"type": "random", "top_k": 2}),
    "random_skip": Row({"type": "random_skip", "top_k": 2, "keep": 0.5}),
    "random_sequences": Row({"type": "random", "top_k": 3, "unit": "sequence", "evaluation": "random"}),
    "random_ensemble": Row({"type": "random", "top_k": 2, "evaluation": "all"}),
    "stable": Row(
        {"type": "stable", "vocabulary_size": VOCABULARY, "width": 5},
        unreached={
            "token_embedding": "learns by the distillation loss",
            "token_weight": "learns by the distillation loss",
        },
    ),
    "dense_to_sparse": Row({"type": "dense_to_sparse", "threshold": 0.05}),
    "dense_to_sparse_without_noise": Row(
        {"type": "dense_to_sparse", "temperature": 0.5, "threshold": 0.1, "noise": False}
    ),
    "growing_top_k": Row({"type": "scheduled_top_k", "top_k": {"start": 2, "end": 6}, "normalize_top_k": True}),
    "smoe_dropout": Row(
        {"type": "scheduled_top_k", "top_k": {"start": 2, "end": 8}, "frozen": True, "evaluation_top_k": 3}
    ),
    "frozen_top_k": Row({"type": "scheduled_top_k", "top_k": 2, "frozen": True, "score_function": "sigmoid"}),
    "noisy_top_k": Row({"type": "noisy_top_k", "top_k": 3}),
    "noisy_fixed": Row({"type": "noisy_top_k", "top_k": 1, "noise": "fixed", "softmax_over": "all"}),
    "cosine": Row({"type": "cosine", "top_k": 2}),
    "cosine_sigmoid": Row({"type": "cosine", "top_k": 1, "score_function": "sigmoid", "projection_bias": True}),
    "cosine_released": Row(
        {"type": "cosine", "top_k": 1, "form": "released"},
    ),
    "cosine_tutel": Row(
        {
            "type": "cosine",
            "top_k": 2,
            "projection_size": 12,
            "projection_bias": True,
            "temperature": 0.5,
            "balance_temperature": "learned",
        }
    ),
    "threshold": Row({"type": "threshold"}),
    "threshold_at_most_two": Row({"type": "threshold", "max_experts": 2}),
    "dselect_k": Row({"type": "dselect_k", "num_selectors": 2, "gamma": 4.0}),
    "dselect_k_static": Row(
        {"type": "dselect_k", "num_selectors": 2, "gamma": 1.5, "conditioned_on": "nothing"},
        balanced="all tokens run the same experts, whose scores sum to 1",
    ),
    "gshard_second": Row({"type": "sampled_second", "policy": "dispatch"}),
    "deepspeed_second": Row({"type": "sampled_second", "policy": "gumbel"}),
    "prototyped": Row({"type": "prototyped", "num_groups": 4}),
    "prototyped_two_of_a_group": Row({"type": "prototyped", "num_groups": 2, "top_k_in_group": 2}),
    "attention": Row({"type": "attention", "top_k": 2, "normalize_top_k": True}),
    "mlp": Row({"type": "mlp", "top_k": 2, "hidden_size": 5, "softmax_over": "selected"}),
    "mlp_tanh": Row(
        {"type": "mlp", "top_k": 1, "hidden_size": 5, "activation": "tanh", "hidden_bias": False, "scaling_factor": 2.0}
    ),
    "normalised": Row({"type": "normalised", "top_k": 2, "scale": 1.5}),
    "normalised_sigmoid": Row(
        {"type": "normalised", "top_k": 2, "score_function": "sigmoid", "linear_bias": False, "stable_ties": False}
    ),
    "null_experts": Row({"type": "null_experts", "top_k": 4, "num_null": 6}),
    "null_experts_more_picks_than_experts": Row({"type": "null_experts", "top_k": 10, "num_null": 5}),
    "null_experts_over_selected": Row(
        {"type": "null_experts", "top_k": 3, "num_null": 8, "normalize_over": "selected", "linear_bias": True}
    ),
    "recurrent": Row({"type": "recurrent", "top_k": 2, "state_size": 5}, unreached=UNUSED_STATE),
    "recurrent_lstm_residual": Row(
        {"type": "recurrent", "top_k": 3, "state_size": 4, "cell": "lstm", "residual": 0.5, "linear_bias": False},
        unreached=UNUSED_STATE,
    ),
    "recurrent_detached": Row(
        {
            "type": "recurrent",
            "top_k": 2,
            "state_size": 5,
            "cell": "rnn",
            "mode": "detached",
            "residual": 1.0,
            "accumulate_residual": True,
            "shared_projector": True,
        },
        unreached=UNUSED_STATE,
    ),
    "recurrent_cosine": Row(
        {"type": "recurrent", "top_k": 2, "state_size": 5, "head": "cosine", "head_size": 3}, unreached=UNUSED_STATE
    ),
    "recurrent_no_passing": Row(
        {"type": "recurrent", "top_k": 2, "state_size": 5, "mode": "no_passing", "freeze_head": True},
        unreached=UNUSED_STATE,
    ),
    "recurrent_learned_start": Row(
        {
            "type": "recurrent",
            "top_k": 1,
            "state_size": 5,
            "mode": "learned_start",
            "normalize_top_k": False,
            "residual": 0.5,
            "detach_residual": True,
        }
    ),
    "longcat_flash": Row(
        {
            "type": "null_experts",
            "top_k": 4,
            "num_null": 4,
            "normalize_over": "none",
            "null_output": "identity",
            "scaling_factor": 6.0,
            "selection_bias": True,
        }
    ),
    "base_assignment": Row({"type": "base_assignment"}),
    "base_assignment_in_sequences": Row({"type": "base_assignment", "scope": "sequence", "linear_bias": True}),
    "sinkhorn": Row({"type": "sinkhorn"}),
    "sinkhorn_in_sequences": Row(
        {"type": "sinkhorn", "top_k": 2, "scope": "sequence", "score_function": "sigmoid", "linear_bias": True}
    ),
    "merged": Row({"type": "merged"}, balanced="every sequence merges all experts"),
    "merged_plain": Row(
        {"type": "merged", "expert_dropout": 0.0, "normalize_input": False, "normalize_weight": False},
        balanced="every sequence merges all experts",
    ),
    "merged_top_k": Row({"type": "merged_top_k", "top_k": 3, "normalize_top_k": False}),
    "merged_top_k_token_bottleneck": Row({"type": "merged_top_k", "top_k": 3, "token_bottleneck": 4}),
    "merged_top_k_normalised": Row(
        {
            "type": "merged_top_k",
            "top_k": 2,
            "score_function": "sigmoid",
            "normalize_top_k": True,
            "linear_bias": True,
        }
    ),
    "segment_merged": Row({"type": "segment_merged", "segment_length": 2}, balanced="every segment merges all experts"),
    "segment_merged_causal": Row(
        {"type": "segment_merged", "segment_length": 2, "first_segment": "equal"},
        balanced="every segment merges all experts",
    ),
    "mixture_of_tokens": Row({"type": "mixture_of_tokens"}, balanced="every token gets outputs of all experts"),
    "mixture_of_tokens_in_groups": Row(
        {"type": "mixture_of_tokens", "group_size": 3}, balanced="every token gets outputs of all experts"
    ),
    "soft_slots": Row({"type": "soft_slots"}, balanced="every token gets outputs of all experts"),
    "soft_slots_unnormalised": Row(
        {"type": "soft_slots", "slots_per_expert": 3, "normalize": False},
        balanced="every token gets outputs of all experts",
    ),
    "expert_choice": Row({"type": "expert_choice"}, balanced="every expert takes the same number of tokens"),
    "expert_choice_over_the_batch": Row(
        {"type": "expert_choice", "scope": "batch", "score_function": "sigmoid", "capacity_factor": 1.5},
        balanced="every expert takes the same number of tokens",
    ),
    "expert_choice_with_threshold": Row(
        {"type": "expert_choice", "decoding": "threshold", "max_experts_per_token": 3},
        balanced="every expert takes the same number of tokens",
    ),
}
