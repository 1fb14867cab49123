"""Which action expert a run builds, and what it asks of the VLM beside it."""

from torch import nn

from recap_ds.config import ModelConfig, PiStarRECAPConfig
from recap_ds.errors import UsageError
from recap_ds.models.dit_cross import DiTCrossExpert
from recap_ds.models.pi_joint import PiDimensions, PiJointExpert

ActionExpert = DiTCrossExpert | PiJointExpert


def needs_keys(config: PiStarRECAPConfig) -> bool:
    """True = the prefix has to bring every layer's keys and values."""
    return config.model.action_expert == "pi_joint" and "action_expert" in config.heads


def build_expert(config: PiStarRECAPConfig, network: nn.Module) -> ActionExpert:
    """``network``: the VLM's, whose configuration decides what the expert has to share with it."""
    model, state_dim, action_dim = config.model, config.max_state_dim, config.max_action_dim
    if model.action_expert == "dit_cross":
        return DiTCrossExpert(model, network.config.text_config.hidden_size, state_dim, action_dim)
    dims = pi_dimensions(model, network.config.text_config)
    return PiJointExpert(dims, state_dim, action_dim, told_in_words=config.is_told_in_words)


def pi_dimensions(model: ModelConfig, text_config) -> PiDimensions:
    """The expert's sizes beside a language model. UsageError where the two cannot attend together."""
    if text_config.model_type != "gemma":
        raise UsageError(
            f"model.action_expert: pi_joint attends layer by layer to Gemma 1, which PaliGemma 1 has; that of "
            f"{model.vlm_model_name} is {text_config.model_type}; set dit_cross or another model.vlm_model_name"
        )
    for key, ours, theirs in (
        ("num_layers", model.action_expert_num_layers, text_config.num_hidden_layers),
        ("num_heads", model.action_expert_num_heads, text_config.num_attention_heads),
    ):
        if ours != theirs:
            raise UsageError(
                f"model.action_expert_{key}: {ours}, but pi_joint attends layer by layer, head by head to the VLM, "
                f"which has {theirs}; set it to that"
            )
    width = model.action_expert_hidden_size
    return PiDimensions(
        version=model.pi_version,
        width=width,
        mlp_width=round(width * model.action_expert_mlp_ratio),
        num_layers=text_config.num_hidden_layers,
        num_heads=text_config.num_attention_heads,
        num_kv_heads=text_config.num_key_value_heads,
        head_dim=text_config.head_dim,
        rope_theta=text_config.rope_parameters["rope_theta"],
    )
