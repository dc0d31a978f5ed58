"""Patched Gemma 3 text: legacy rotary per layer kind, explicit masks, strided slice, int8 linears; the stock numbers.

Copied beside the weights and loaded by transformers as remote code; needs torch and transformers alone.
"""

from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin

from .configuration_gemma3_vacc import Gemma3TextConfig
from .decoder_vacc import CausalLMMixin, SequenceClassificationMixin
from .encoder_vacc import EncoderTextModelMixin
from .layers_vacc import Attention, FourNormLayer, LegacyRotary, RMSNorm, ScaledEmbedding

__all__ = ["Gemma3ForCausalLM", "Gemma3PreTrainedModel", "Gemma3TextForSequenceClassification", "Gemma3TextModel"]


class Gemma3DecoderLayer(FourNormLayer):
    """Normed queries and keys; five sliding layers, then a global one."""

    def __init__(self, config: Gemma3TextConfig, layer_idx: int):
        scaling = config.query_pre_attn_scalar**-0.5
        super().__init__(config, Attention(config, layer_idx, scaling=scaling, qk_norm=True))


class Gemma3PreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = Gemma3TextConfig
    config: Gemma3TextConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Gemma3DecoderLayer"]  # noqa: RUF012 (transformers' own form)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, RMSNorm):
            nn.init.zeros_(module.weight)


class Gemma3TextModel(EncoderTextModelMixin, Gemma3PreTrainedModel):
    """Embedding, decoder layers, final norm; a rotary table for each kind of layer present.

    With `config.use_bidirectional_attention` an encoder (EmbeddingGemma), whose window lies on both sides.
    """

    def __init__(self, config: Gemma3TextConfig):
        super().__init__(config)
        self.encodes = bool(config.use_bidirectional_attention)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = ScaledEmbedding(
            config.vocab_size, config.hidden_size, config.pad_token_id, config.embed_scale
        )
        self.layers = nn.ModuleList(Gemma3DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        kinds = sorted(set(config.layer_types))
        self.rotary = nn.ModuleDict(
            {kind: LegacyRotary.of(config.head_dim, config.rope_parameters[kind]) for kind in kinds}
        )
        self.gradient_checkpointing = False
        self.post_init()


class Gemma3ForCausalLM(CausalLMMixin, Gemma3PreTrainedModel, GenerationMixin):
    """Gemma 3 text with its language model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: Gemma3TextConfig):
        super().__init__(config)
        self.model = Gemma3TextModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class Gemma3TextForSequenceClassification(SequenceClassificationMixin, Gemma3PreTrainedModel):
    """Gemma 3 text with a classification head on the last real token."""

    def __init__(self, config: Gemma3TextConfig):
        super().__init__(config)
        self.model = Gemma3TextModel(config)
        self._make_head(config)
        self.post_init()
