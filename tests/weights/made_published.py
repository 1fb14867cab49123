"""Random pi0 / pi0.5 models in sizes of their own, and their tensors by the names that others gave them."""

import torch

from recap_ds.models.building import Builder
from recap_ds.models.pi_joint import PiDimensions, PiJointExpert
from recap_ds.models.vlm import build_paligemma

# As many heads as published models have, which shapes do not tell.
TOWER = {"depth": 2, "num_heads": 8, "num_kv_heads": 2, "head_dim": 6}
CHUNK, ACTIONS, STATES, STEPS, SIDE = 5, 7, 4, 3, 16


def config_of(version):
    return {
        "type": version,
        "text": {"width": 20, "mlp_dim": 28, "vocab_size": 60, **TOWER},
        "expert": {"width": 12, "mlp_dim": 22, "adarms": version == "pi05", **TOWER},
        "vision": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 16,
            "intermediate_size": 24,
            "patch_size": 4,
            "image_size": SIDE,
            "projection_dim": 20,
        },
        "chunk_size": CHUNK,
        "max_action_dim": ACTIONS,
        "max_state_dim": STATES,
        "num_inference_steps": STEPS,
        "num_cameras": 3,
    }


def random_modules(version):
    from transformers import PaliGemmaConfig

    config = config_of(version)
    text, expert = config["text"], config["expert"]
    vlm_config = PaliGemmaConfig(
        text_config={
            "model_type": "gemma",
            "hidden_size": text["width"],
            "intermediate_size": text["mlp_dim"],
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "vocab_size": 60,
        },
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **config["vision"]},
        projection_dim=20,
        image_token_index=59,
    )
    dims = PiDimensions(version, expert["width"], expert["mlp_dim"], 2, 8, 2, 6, 10_000.0)
    modules = build_paligemma(vlm_config, Builder()).eval(), PiJointExpert(dims, STATES, ACTIONS).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in modules:
            for name, parameter in module.named_parameters():
                scale = 0.0 if name == "indicator_in.weight" else 0.25
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return modules


def published(paligemma, expert):
    towers = "model.paligemma_with_expert."
    tensors = {f"{towers}gemma_expert.lm_head.weight": torch.zeros(60, 12)}
    for name, value in paligemma.state_dict().items():
        spelled = name.replace("vision_tower.", "vision_tower.vision_model.")
        tensors[f"{towers}paligemma.model.{spelled}"] = value
    for name, value in expert.state_dict().items():
        inside = name.startswith(("layers.", "norm."))
        if name != "indicator_in.weight":
            tensors[f"{towers}gemma_expert.model.{name}" if inside else f"model.{name}"] = value
    return tensors
