"""Random image-text-to-text models of several architectures, saved as transformers saves them."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedTokenizerFast

IMAGE_MEAN, IMAGE_STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
IMAGE_TOKEN = 299
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 300,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
SIGLIP = {"model_type": "siglip_vision_model", **VISION}
CLIP = {"model_type": "clip_vision_model", "projection_dim": 32, **VISION}
# Architectures that pass, and that differ: in the mask, the vision tower, pooling, layer types and norms.
CONFIGS: dict[str, dict[str, Any]] = {
    "paligemma": {"text_config": {"model_type": "gemma", **TEXT}, "vision_config": SIGLIP, "projection_dim": 32},
    "gemma3": {
        "text_config": {
            "model_type": "gemma3_text",
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention"],
            **TEXT,
        },
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 4,
    },
    # Reads the last vision layer but one: whatever comes after it matters to nothing.
    "llava": {"text_config": {"model_type": "llama", **TEXT}, "vision_config": CLIP},
    "internvl": {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": VISION | {"model_type": "internvl_vision", "image_size": [32, 32], "patch_size": [8, 8]},
    },
}
# Their image paths ask for more than pixels.
OTHERS: dict[str, dict[str, Any]] = {
    "smolvlm": {"text_config": {"model_type": "llama", **TEXT}, "vision_config": VISION, "scale_factor": 2},
    "qwen2_vl": {
        "text_config": TEXT,
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 8},
    },
    "llava_next": {"text_config": {"model_type": "llama", **TEXT}, "vision_config": CLIP},
}


def build(name: str) -> nn.Module:
    """The whole model with a language head, in eval mode, every parameter moved so that each would be missed."""
    values = (CONFIGS | OTHERS)[name]
    # Which of the two spellings an architecture knows, differs.
    config = CONFIG_MAPPING[name](**values, image_token_id=IMAGE_TOKEN, image_token_index=IMAGE_TOKEN)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def save(model: nn.Module, folder: Path) -> Path:
    """A folder as it would be on the hub: weights, pixel statistics and a tokenizer without <bos>."""
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": IMAGE_MEAN, "image_std": IMAGE_STD}))
    words = ["<pad>", "<eos>", "<unk>", "move", "the", "dot", "to", "square", "reach", "red", "green", "blue"]
    fast = FastTokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = Split(" ", "removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    return folder
