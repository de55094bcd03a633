"""The MoE architectures that dense models become."""

from dataclasses import replace

from upcycle.architectures.family import Moe
from upcycle.architectures.layouts import (
    GLM_SHARED_EXPERT,
    GRANITE_LAYOUT,
    GRANITE_SHARED_EXPERT,
    GRANITE_SWA_LAYOUT,
    HUNYUAN_SHARED_EXPERT,
    LFM2_LAYOUT,
    MIXTRAL_LAYOUT,
    NEMOTRON_LAYOUT,
    OPEN_GATE,
    QKV_BIAS,
    QWEN_LAYOUT,
    SHARED_EXPERT,
    selection_bias,
    with_constants,
)

GRANITE_FIELDS = "num_local_experts", "intermediate_size"
MIXTRAL = Moe("mixtral", "MixtralForCausalLM", MIXTRAL_LAYOUT, "num_local_experts", "intermediate_size")
QWEN2_MOE = Moe(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    with_constants(QWEN_LAYOUT, *SHARED_EXPERT, *QKV_BIAS),
    partial="any",
)
QWEN3_MOE = Moe("qwen3_moe", "Qwen3MoeForCausalLM", QWEN_LAYOUT, partial="any")
QWEN3_5_MOE = Moe("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", with_constants(QWEN_LAYOUT, *SHARED_EXPERT))
MELLUM = Moe("mellum", "MellumForCausalLM", QWEN_LAYOUT, partial="any")
FLEX_OLMO = Moe("flex_olmo", "FlexOlmoForCausalLM", QWEN_LAYOUT, size_field="intermediate_size")
GRANITE_MOE = Moe("granitemoe", "GraniteMoeForCausalLM", GRANITE_LAYOUT, *GRANITE_FIELDS)
GRANITE_MOE_SWA = Moe("granitemoe_swa", "GraniteMoeSWAForCausalLM", GRANITE_SWA_LAYOUT, *GRANITE_FIELDS)
GRANITE_MOE_HYBRID = Moe(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    with_constants(GRANITE_LAYOUT, *GRANITE_SHARED_EXPERT),
    *GRANITE_FIELDS,
)
COHERE2_MOE = Moe("cohere2_moe", "Cohere2MoeForCausalLM", QWEN_LAYOUT, size_field="intermediate_size", partial="any")
ERNIE_MOE = Moe(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    with_constants(QWEN_LAYOUT, selection_bias("mlp.moe_statics.e_score_correction_bias", (1,))),
    "moe_num_experts",
    active_field="moe_k",
    partial="any",
)
GLM_MOE = Moe(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    with_constants(QWEN_LAYOUT, selection_bias("mlp.gate.e_score_correction_bias"), *GLM_SHARED_EXPERT),
    "n_routed_experts",
    partial="first",
    routing="sigmoid",
    least_experts=2,
)
DEEPSEEK_V3 = replace(GLM_MOE, model_type="deepseek_v3", architecture="DeepseekV3ForCausalLM")
BEAM = Moe(
    "beam",
    "BeamForCausalLM",
    with_constants(QWEN_LAYOUT, selection_bias("mlp.gate.e_score_correction_bias"), *OPEN_GATE),
    partial="any",
    routing="sigmoid",
    least_experts=2,
)
LFM2_MOE = Moe("lfm2_moe", "Lfm2MoeForCausalLM", LFM2_LAYOUT, partial="first", routing="sigmoid")
HUNYUAN_MOE = Moe(
    "hunyuan_v1_moe",
    "HunYuanMoEV1ForCausalLM",
    with_constants(replace(QWEN_LAYOUT, router="mlp.gate.wg.weight"), *HUNYUAN_SHARED_EXPERT),
    size_field="intermediate_size",
    active_field="moe_topk",
)
NEMOTRON_H = Moe(
    "nemotron_h",
    "NemotronHForCausalLM",
    NEMOTRON_LAYOUT,
    "n_routed_experts",
    partial="any",
    routing="sigmoid",
    least_experts=2,
)
