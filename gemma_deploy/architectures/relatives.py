"""Models with Gemma in their name that are not built, so that a refusal can say which one it met and what it is."""

from __future__ import annotations

ENCODER_DECODER = "an encoder and a decoder"
IMAGES_ALONE = "an encoder of images"
SOUND_ALONE = "an encoder of sound"
# model_type in transformers: the model's name, and what about it is not built
RELATIVES: dict[str, tuple[str, str]] = {
    "colpali": ("ColPali", "a model of images and text that gives one vector for each token"),
    "diffusion_gemma": ("DiffusionGemma", "which fills blocks of tokens in any order"),
    "diffusion_gemma_text": ("DiffusionGemma", "which fills blocks of tokens in any order"),
    "gemma3n_audio": ("the audio part of Gemma 3n", SOUND_ALONE),
    "gemma3n_vision": ("the vision part of Gemma 3n", IMAGES_ALONE),
    "gemma4_audio": ("the audio part of Gemma 4", SOUND_ALONE),
    "gemma4_unified_audio": ("the audio part of Gemma 4 12B", SOUND_ALONE),
    "gemma4_unified_vision": ("the vision part of Gemma 4 12B", IMAGES_ALONE),
    "gemma4_vision": ("the vision part of Gemma 4", IMAGES_ALONE),
    "paligemma": ("PaliGemma", "whose text attends to images in both directions"),
    "recurrent_gemma": ("RecurrentGemma", "whose recurrent layers keep a state in place of keys and values"),
    "shieldgemma2": ("ShieldGemma 2", "a classifier of images"),
    "t5gemma": ("T5Gemma", ENCODER_DECODER),
    "t5gemma2": ("T5Gemma 2", ENCODER_DECODER),
    "t5gemma2_decoder": ("T5Gemma 2", ENCODER_DECODER),
    "t5gemma2_encoder": ("T5Gemma 2", ENCODER_DECODER),
    "t5gemma2_text": ("T5Gemma 2", ENCODER_DECODER),
    "t5_gemma_module": ("T5Gemma", ENCODER_DECODER),
}


def not_built(model_type: object) -> str | None:
    """What to say of a model type that is not built, `NAME, which ..., is not built`; None where it is none of them."""
    found = RELATIVES.get(model_type) if isinstance(model_type, str) else None
    return None if found is None else f"{found[0]}, {found[1]}, is not built (model_type {model_type!r})"
