"""Names of modules that PaliGemma and Gemma 3 share."""

from types import MappingProxyType

GEMMA_LAYERS = r"model\.language_model\.layers\.\d+"
GEMMA_ATTENTION = r"self_attn\.(q_proj|k_proj|v_proj|o_proj)"
GEMMA_LANGUAGE = rf"{GEMMA_LAYERS}\.({GEMMA_ATTENTION}|mlp\.(gate_proj|up_proj|down_proj))"
GEMMA_VISION = (
    r"model\.vision_tower\.encoder\.layers\.\d+"
    r"\.(self_attn\.(q_proj|k_proj|v_proj|out_proj)|mlp\.(fc1|fc2))"
)
GEMMA_PARTS = MappingProxyType(
    {
        "vision": "model.vision_tower",
        "projector": "model.multi_modal_projector",
        "language": "model.language_model",
        "lm_head": "lm_head",
    }
)
