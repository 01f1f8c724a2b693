"""Knowing a stock module by what its code says.

transformers repeats the same forward in dozens of families. A module is computed natively where its forward is, word
for word, one whose meaning the native code has; in any other family or version it runs as it is.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

RMS_NORM = """
input_dtype = hidden_states.dtype
hidden_states = hidden_states.to(torch.float32)
variance = hidden_states.pow(2).mean(-1, keepdim=True)
hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
return self.weight * hidden_states.to(input_dtype)
"""

ROTATION = """
cos = cos.unsqueeze(unsqueeze_dim)
sin = sin.unsqueeze(unsqueeze_dim)
q_embed = (q * cos) + (rotate_half(q) * sin)
k_embed = (k * cos) + (rotate_half(k) * sin)
return q_embed, k_embed
"""

ROTATE_HALF = """
x1 = x[..., : x.shape[-1] // 2]
x2 = x[..., x.shape[-1] // 2 :]
return torch.cat((-x2, x1), dim=-1)
"""

_ATTENTION = """
input_shape = hidden_states.shape[:-1]
hidden_shape = (*input_shape, -1, self.head_dim)
{queries}
cos, sin = position_embeddings
query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
if past_key_values is not None:
    key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)
attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
    self.config._attn_implementation, eager_attention_forward
)
attn_output, attn_weights = attention_interface(
    self, query_states, key_states, value_states, attention_mask,
    dropout=0.0 if not self.training else self.attention_dropout, scaling=self.scaling, {window}**kwargs,
)
attn_output = attn_output.reshape(*input_shape, -1).contiguous()
attn_output = self.o_proj(attn_output)
return attn_output, attn_weights
"""
_PLAIN = """query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)"""
_NORMED = """query_states = self.q_norm(self.q_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
key_states = self.k_norm(self.k_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)"""
# The window is in the mask and in the kind of cache; torch's attention ignores the argument.
_WINDOWS = (
    "",
    "sliding_window=self.sliding_window, ",
    'sliding_window=getattr(self.config, "sliding_window", None), ',
)
ATTENTION = tuple(_ATTENTION.format(queries=_PLAIN, window=window) for window in _WINDOWS)
ATTENTION_WITH_HEAD_NORMS = tuple(_ATTENTION.format(queries=_NORMED, window=window) for window in _WINDOWS)

_ROUTER = """
hidden_states = hidden_states.reshape(-1, self.hidden_dim)
router_logits = F.linear(hidden_states, self.weight)
router_probs = torch.nn.functional.softmax({logits}, dim=-1)
router_top_value, router_indices = torch.topk(router_probs, self.top_k, dim=-1)
{normalize}
{cast}
router_scores = router_top_value
return router_logits, router_scores, router_indices
"""
_DIVIDE = "router_top_value /= router_top_value.sum(dim=-1, keepdim=True)"
_CAST = "router_top_value = router_top_value.to(router_logits.dtype)"
_IN_FLOAT = "router_logits, dtype=torch.float"
# Whether the weights sum to one is an attribute, or they always do; and they are cast to the dtype of the model, or not.
SOFTMAX_ROUTER = _ROUTER.format(logits=_IN_FLOAT, normalize=f"if self.norm_topk_prob:\n    {_DIVIDE}", cast=_CAST)
NORMALIZED_ROUTER = _ROUTER.format(logits=_IN_FLOAT, normalize=_DIVIDE, cast=_CAST)
NORMALIZED_FLOAT_ROUTER = _ROUTER.format(logits="router_logits.float()", normalize=_DIVIDE, cast="")

_LAYER = """
residual = hidden_states
hidden_states = self.input_layernorm(hidden_states)
hidden_states, _ = self.self_attn(hidden_states=hidden_states, {keywords}, **kwargs)
hidden_states = residual + hidden_states
residual = hidden_states
hidden_states = self.post_attention_layernorm(hidden_states)
hidden_states = self.mlp(hidden_states)
hidden_states = residual + hidden_states
return hidden_states
"""
DECODER_LAYERS = tuple(
    _LAYER.format(keywords=", ".join(f"{name}={name}" for name in names.split()))
    for names in (
        "attention_mask position_ids past_key_values use_cache position_embeddings",
        "position_embeddings attention_mask position_ids past_key_values",
    )
)

SPARSE_BLOCKS = (
    """
batch_size, sequence_length, hidden_dim = hidden_states.shape
hidden_states_reshaped = hidden_states.view(-1, hidden_dim)
_, routing_weights, selected_experts = self.gate(hidden_states_reshaped)
final_hidden_states = self.experts(hidden_states_reshaped, selected_experts, routing_weights)
return final_hidden_states.reshape(batch_size, sequence_length, hidden_dim)
""",
    """
batch_size, sequence_length, hidden_dim = hidden_states.shape
hidden_states = hidden_states.view(-1, hidden_dim)
_, top_k_weights, top_k_index = self.gate(hidden_states)
final_hidden_states = self.experts(hidden_states, top_k_index, top_k_weights).reshape(
    batch_size, sequence_length, hidden_dim
)
return final_hidden_states
""",
    """
batch_size, sequence_length, hidden_dim = hidden_states.shape
if self.training and self.jitter_noise > 0:
    hidden_states *= torch.empty_like(hidden_states).uniform_(1.0 - self.jitter_noise, 1.0 + self.jitter_noise)
hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
_, top_k_weights, top_k_index = self.gate(hidden_states)
hidden_states = self.experts(hidden_states, top_k_index, top_k_weights)
hidden_states = hidden_states.reshape(batch_size, sequence_length, hidden_dim)
return hidden_states
""",
)


@functools.cache
def says(function: Callable[..., Any], *bodies: str) -> bool:
    """Whether the body of `function`, its docstring left out, is one of `bodies`, apart from layout."""
    written = _written(function)
    return written is not None and any(written == ast.unparse(ast.parse(body)) for body in bodies)


@functools.cache
def _written(function: Callable[..., Any]) -> str | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):  # no source, as in a frozen program
        return None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        return None
    body = definition.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    return ast.unparse(ast.Module(body=body, type_ignores=[]))


def global_of(function: Callable[..., Any], name: str) -> Any:
    """What a name means inside `function`, or None."""
    return getattr(inspect.unwrap(function), "__globals__", {}).get(name)
