"""The stock MoE families that can be converted. To add one: its conversion, a line here, a row in the tests and docs."""

from __future__ import annotations

from transformers import PreTrainedConfig

from moesaic.errors import UnsupportedModel
from moesaic.hf.conversion.base import FamilyConversion
from moesaic.hf.conversion.deepseek import DeepseekV2Conversion, DeepseekV3Conversion, Fields
from moesaic.hf.conversion.gpt_oss import GptOssConversion
from moesaic.hf.conversion.granitemoe import GraniteMoeConversion
from moesaic.hf.conversion.hunyuan import HunyuanConversion
from moesaic.hf.conversion.mixtral import MixtralConversion
from moesaic.hf.conversion.qwen_moe import MellumConversion, OlmoeConversion, Qwen2MoeConversion, Qwen3MoeConversion
from moesaic.layer import MoESpec

CONVERSIONS: dict[str, FamilyConversion] = {
    "mixtral": MixtralConversion(),
    "qwen2_moe": Qwen2MoeConversion(),
    "qwen3_moe": Qwen3MoeConversion(),
    "mellum": MellumConversion(),
    "olmoe": OlmoeConversion(),
    "flex_olmo": OlmoeConversion(),
    "deepseek_v2": DeepseekV2Conversion(),
    "deepseek_v3": DeepseekV3Conversion(),
    "dots1": DeepseekV3Conversion(),
    "exaone_moe": DeepseekV3Conversion(Fields("num_experts", "num_shared_experts", "mlp_layer_types")),
    "glm4_moe": DeepseekV3Conversion(),
    "glm4_moe_lite": DeepseekV3Conversion(Fields(layers="mlp_layer_types")),
    "solar_open": DeepseekV3Conversion(Fields(layers=None)),
    "hunyuan_v1_moe": HunyuanConversion(),
    "gpt_oss": GptOssConversion(),
    "granitemoe": GraniteMoeConversion(),
}


def conversion_of(config: PreTrainedConfig) -> FamilyConversion:
    """The conversion of a stock MoE config's family.

    Raises:
        UnsupportedModel: if there is none, with the families that have one.
    """
    conversion = CONVERSIONS.get(config.model_type)
    if conversion is None:
        raise UnsupportedModel(
            f"model_type = {config.model_type!r} is not an MoE family that can be converted; convertible are "
            f"{', '.join(sorted(CONVERSIONS))}, and moesaic.upcycle makes MoE models of dense ones"
        )
    return conversion


def spec_from_config(config: PreTrainedConfig) -> MoESpec:
    """What the MoE layers of a stock model with this config compute.

    Raises:
        UnsupportedModel: if the family is not known or a field asks for something that a spec can't say.
    """
    return conversion_of(config).spec(config)
