"""`convert`: a stock MoE model as ours."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic.errors import UnsupportedModel
from moesaic.hf.compat import causal_lm_class
from moesaic.hf.conversion.registry import conversion_of
from moesaic.hf.model import MoesaicForCausalLM
from moesaic.hf.transplant import transplant


def convert(hf_moe_model: PreTrainedModel) -> MoesaicForCausalLM:
    """Our model with the weights of a stock MoE model, and the same logits in float32.

    Everything outside the MoE blocks stays the stock family's own code. Weights are copied.

    Args:
        hf_moe_model: a stock `...ForCausalLM` of one of the families in docs/convert.md.

    Raises:
        UnsupportedModel: if the family is not known, its config asks for something that `MoESpec` can't say, or the
            model is quantised or not a causal language model.
    """
    config = hf_moe_model.config
    conversion = conversion_of(config)
    stock_class = causal_lm_class(config)
    if not isinstance(hf_moe_model, stock_class):
        raise UnsupportedModel(f"{type(hf_moe_model).__name__} is not a {stock_class.__name__}; load it as one")
    if getattr(hf_moe_model, "is_quantized", False):
        raise UnsupportedModel(
            f"{config.model_type}: the weights are quantised; load the model with a quantization config that has "
            "dequantize=True, for gpt-oss Mxfp4Config(dequantize=True)"
        )

    def block_tensors(block: nn.Module) -> dict[str, Tensor]:
        return conversion.to_block(block.state_dict())

    model = transplant(hf_moe_model, conversion.spec(config), block_tensors)
    model.config.output_router_logits = bool(config.output_router_logits)
    return model
