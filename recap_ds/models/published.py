"""PaliGemma's architecture as its authors published it, for sizing a run where the hub is out of reach.

PaliGemma-3B (arXiv 2407.07726): SigLIP So400m/14 (arXiv 2303.15343) and Gemma 2B (arXiv 2403.08295), 2,923,466,480
parameters without the tied language head at 224 px. The same in pi0 and pi0.5 (arXiv 2410.24164, 2504.16054), without
the rows that transformers pads the table of words by. Numbers only; weights and tokenizer have no stand-in.
"""

IMAGE_SIZES = {f"google/paligemma-3b-{kind}-{size}": size for kind in ("pt", "mix") for size in (224, 448, 896)}
NUM_WORDS, NUM_WORDS_PADDED = 257_152, 257_216


def published_config(name: str, num_words: int = NUM_WORDS_PADDED):
    """transformers' PaliGemmaConfig of a hub id; None for one that is not PaliGemma-3B."""
    from transformers import PaliGemmaConfig

    if name not in IMAGE_SIZES:
        return None
    return PaliGemmaConfig(
        text_config={
            "model_type": "gemma",
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": num_words,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": IMAGE_SIZES[name],
            "patch_size": 14,
            "vision_use_head": False,
        },
        projection_dim=2048,
        image_token_index=NUM_WORDS,
    )
