"""Every fact of what Gemma computes, broken once: the comparison with the stock eager class must see each of them.

The facts and who got them wrong: rows of the table in docs/gemma-facts.md. Each breakage is what some public
tool does or did.
"""

import functools

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.patched import patched_causal, patched_module
from gemma_deploy.testing import TINY_EXPERTS, TINY_PER_LAYER, write_tiny_checkpoint

LAYERS = patched_module("layers_vacc")
GAINS = patched_module("gain_vacc")
GEMMA, GEMMA2, GEMMA3, VAULT, GEMMA4 = "gemma", "gemma2", "gemma3_text", "vaultgemma", "gemma4_text"
ONE_PLUS = (GEMMA, GEMMA2, GEMMA3, VAULT)  # what norms multiply by
ALL = (*ONE_PLUS, GEMMA4)
EXPERTS = patched_module("experts_vacc")
MIXTURE = "gemma4 with experts"
PER_LAYER = "gemma4 with per-layer embeddings and shared keys and values"


def norm_casts_before_the_gain(model, patch):
    def forward(self, x):
        hat = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return hat.type_as(x) * (1.0 + self.weight)

    patch.setattr(LAYERS.RMSNorm, "forward", forward)


def norm_gain_is_the_weight(model, patch):
    for module in model.modules():
        if isinstance(module, LAYERS.RMSNorm):
            module.weight.data -= 1


def gelu_is_exact(model, patch):
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU()


def embedding_scale_has_two_decimals(model, patch):
    patch.setattr(LAYERS.ScaledEmbedding, "scale_value", lambda self, dtype: round(self.embedding_dim**0.5, 2) + 0.01)


def embedding_scale_is_not_rounded_to_the_run_dtype(model, patch):
    def forward(self, ids):
        return (nn.functional.embedding(ids, self.weight).float() * self.embedding_dim**0.5).to(self.weight.dtype)

    patch.setattr(LAYERS.ScaledEmbedding, "forward", forward)


def attention_scale_is_head_dim(model, patch):
    for layer in model.model.layers:
        layer.self_attn.scaling = layer.self_attn.head_dim**-0.5


def attention_cap_is_dropped(model, patch):
    for layer in model.model.layers:
        layer.self_attn.softcap = None


def attention_cap_after_the_mask(model, patch):
    def softmax(weights, mask, softcap):
        weights = torch.tanh((weights + mask) / softcap) * softcap
        return nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(weights.dtype)

    patch.setattr(LAYERS, "masked_softmax", softmax)


def final_cap_is_dropped(model, patch):
    model.config.final_logit_softcapping = None


def layer_order_is_reversed(model, patch):
    model.config.layer_types = list(reversed(model.config.layer_types))
    if model.config.layer_types[0] == model.config.layer_types[-1]:
        swap = {LAYERS.SLIDING: LAYERS.FULL, LAYERS.FULL: LAYERS.SLIDING}
        model.config.layer_types = [swap[kind] for kind in model.config.layer_types]


def one_theta_for_all_layers(model, patch):
    model.model.rotary[LAYERS.SLIDING] = model.model.rotary[LAYERS.FULL]


def change_factor(rotary, factor):
    rotary.factor, rotary._tables = factor, None


def no_linear_factor(model, patch):
    change_factor(model.model.rotary[LAYERS.FULL], 1.0)


def linear_factor_on_local_layers(model, patch):
    change_factor(model.model.rotary[LAYERS.SLIDING], model.model.rotary[LAYERS.FULL].factor)


def window_is_one_key_wider(model, patch):
    model.config.sliding_window += 1


def window_is_one_key_narrower(model, patch):
    model.config.sliding_window -= 1


def no_query_and_key_norm(model, patch):
    for layer in model.model.layers:
        del layer.self_attn.q_norm, layer.self_attn.k_norm


def norm_after_rotary(model, patch):
    attention = type(model.model.layers[0].self_attn)
    rotary = LAYERS.apply_rotary
    for layer in model.model.layers:
        layer.self_attn.norms = layer.self_attn.q_norm, layer.self_attn.k_norm
        del layer.self_attn._modules["q_norm"], layer.self_attn._modules["k_norm"]
    made = []

    def normed(x, cos, sin):
        made.append(1)
        attend = model.model.layers[(len(made) - 1) // 2 % len(model.model.layers)].self_attn
        return attend.norms[(len(made) - 1) % 2](rotary(x, cos, sin))

    patch.setattr(LAYERS, "apply_rotary", normed)
    assert attention is LAYERS.Attention


def no_norm_before_the_residual(model, patch):
    for layer in model.model.layers:
        layer.post_attention_layernorm = nn.Identity()


def head_is_not_the_table(model, patch):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.roll(1, 0))


def values_share_heads_in_another_order(model, patch):
    def repeat(x, groups):
        return x.repeat(1, groups, 1, 1)

    patch.setattr(LAYERS, "repeat_kv", repeat)


def norm_gain_is_one_plus_the_weight(model, patch):
    for module in model.modules():
        if isinstance(module, GAINS.GainNorm) and module.weight is not None:
            module.weight.data += 1


def values_have_no_norm(model, patch):
    for layer in model.model.layers:
        layer.self_attn.v_norm = nn.Identity()


def values_of_global_layers_have_no_norm(model, patch):
    for layer in model.model.layers:
        if not hasattr(layer.self_attn, "v_proj"):
            layer.self_attn.v_norm = nn.Identity()


def values_are_normed_keys(model, patch):
    for layer in model.model.layers:
        if not hasattr(layer.self_attn, "v_proj"):
            layer.self_attn.v_norm = layer.self_attn.k_norm


def no_number_behind_layers(model, patch):
    for layer in model.model.layers:
        layer.layer_scalar.fill_(1)


def number_of_the_layer_before(model, patch):
    numbers = [layer.layer_scalar.clone() for layer in model.model.layers]
    for layer, number in zip(model.model.layers, numbers[-1:] + numbers[:-1], strict=True):
        layer.layer_scalar.copy_(number)


def number_multiplies_the_branch_alone(model, patch):
    for layer in model.model.layers:
        layer.post_feedforward_layernorm.weight.data *= layer.layer_scalar
        layer.layer_scalar.fill_(1)


def every_channel_of_global_layers_turns(model, patch):
    rotary = model.model.rotary[LAYERS.FULL]
    rotary.rotated, rotary._tables = 1.0, None


def other_channels_turn(model, patch):
    rotary = model.model.rotary[LAYERS.FULL]
    right, rotary._tables = rotary.make_tables, None
    patch.setattr(rotary, "make_tables", lambda length: tuple(table.roll(1, 1) for table in right(length)))


def frequencies_are_those_of_the_turned_part(model, patch):
    rotary = model.model.rotary[LAYERS.FULL]
    rotary.theta **= 1 / rotary.rotated  # theta ** (-2i / (D * share))
    rotary._tables = None


def final_cap_in_front_of_the_head(model, patch):
    cap, head = model.config.final_logit_softcapping, model.lm_head
    model.config.final_logit_softcapping = None
    head.register_forward_pre_hook(lambda module, args: (torch.tanh(args[0] / cap) * cap,))


def shares_the_layer_before(model, patch):
    """Another layer of the same kind than the last one: the first."""
    right = GAINS.SharedAndPerLayer.__init__

    def init(self, kinds, shared, per_layer):
        right(self, kinds, shared, per_layer)
        own = len(kinds) - shared
        self.sources[own:] = [kinds.index(kind) for kind in kinds[own:]]

    patch.setattr(GAINS.SharedAndPerLayer, "__init__", init)


def vectors_of_the_layer_before(model, patch):
    right = GAINS.SharedAndPerLayer.__init__

    def init(self, kinds, shared, per_layer):
        right(self, kinds, shared, per_layer.roll(1, 2))

    patch.setattr(GAINS.SharedAndPerLayer, "__init__", init)


def vectors_have_no_context(model, patch):
    model.model.per_layer_model_projection.weight.data.zero_()


def vectors_are_not_halved(model, patch):
    project = GAINS.PerLayerInputs.project_per_layer
    patch.setattr(GAINS.PerLayerInputs, "project_per_layer", lambda *args: project(*args) * 2**0.5)


def table_has_the_scale_of_its_width(model, patch):
    table = model.model.embed_tokens_per_layer
    table.width = table.embedding_dim


def vectors_behind_the_number(model, patch):
    for layer in model.model.layers:
        layer.post_per_layer_input_norm.weight.data /= layer.layer_scalar


def mlp_of_sharing_layers_is_half_used(model, patch):
    for layer in model.model.layers[-3:]:
        layer.mlp.down_proj.weight.data[:, 160:] = 0


def weights_of_experts_are_not_normalized(model, patch):
    """Their sum over all experts is 1 already, that of the chosen ones is not."""
    patch.setattr(torch.Tensor, "sum", lambda self, *args, keepdim=False, **kwargs: torch.ones_like(self[..., :1]))


def experts_have_no_scale(model, patch):
    for layer in model.model.layers:
        layer.router.per_expert_scale.data.fill_(1)


def experts_have_the_scale_of_their_place(model, patch):
    """Of the first, second and third chosen one, whichever they are."""
    for layer in model.model.layers:
        scale = layer.router.per_expert_scale.data.clone()
        layer.router.per_expert_scale.data.fill_(1)
        layer.router.register_forward_hook(
            lambda module, args, out, scale=scale: (out[0] * scale[: out[0].shape[-1]], out[1])
        )


def up_in_front_of_gate(model, patch):
    for layer in model.model.layers:
        stack = layer.experts.gate_up_proj
        stack.data = torch.cat(stack.data.chunk(2, dim=1)[::-1], dim=1)


def dense_mlp_is_dropped(model, patch):
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.zero_()


def dense_mlp_has_one_norm(model, patch):
    for layer in model.model.layers:
        layer.post_feedforward_layernorm_1 = nn.Identity()


def router_reads_what_experts_read(model, patch):
    for layer in model.model.layers:
        norm = layer.pre_feedforward_layernorm_2
        layer.router.register_forward_pre_hook(lambda module, args, norm=norm: (norm(args[0]),))


def router_has_no_root(model, patch):
    for layer in model.model.layers:
        layer.router.root = 1.0


def one_expert_less(model, patch):
    for layer in model.model.layers:
        layer.router.chosen -= 1


def experts_read_what_the_mlp_reads(model, patch):
    for layer in model.model.layers:
        layer.pre_feedforward_layernorm_2 = layer.pre_feedforward_layernorm


BREAKAGES = [
    *(
        (broken, MIXTURE, torch.float32)
        for broken in (
            weights_of_experts_are_not_normalized,
            experts_have_no_scale,
            experts_have_the_scale_of_their_place,
            up_in_front_of_gate,
            dense_mlp_is_dropped,
            dense_mlp_has_one_norm,
            router_reads_what_experts_read,
            router_has_no_root,
            one_expert_less,
            experts_read_what_the_mlp_reads,
        )
    ),
    *(
        (broken, PER_LAYER, torch.float32)
        for broken in (
            shares_the_layer_before,
            vectors_of_the_layer_before,
            vectors_have_no_context,
            vectors_are_not_halved,
            table_has_the_scale_of_its_width,
            vectors_behind_the_number,
            mlp_of_sharing_layers_is_half_used,
        )
    ),
    *((norm_casts_before_the_gain, model, torch.bfloat16) for model in ONE_PLUS),
    *((norm_gain_is_the_weight, model, torch.float32) for model in ONE_PLUS),
    *(
        (broken, GEMMA4, torch.float32)
        for broken in (
            norm_gain_is_one_plus_the_weight,
            values_have_no_norm,
            values_of_global_layers_have_no_norm,
            values_are_normed_keys,
            no_number_behind_layers,
            number_of_the_layer_before,
            number_multiplies_the_branch_alone,
            every_channel_of_global_layers_turns,
            other_channels_turn,
            frequencies_are_those_of_the_turned_part,
            final_cap_in_front_of_the_head,
            attention_scale_is_head_dim,
            window_is_one_key_narrower,
            values_share_heads_in_another_order,
        )
    ),
    *((gelu_is_exact, model, torch.float32) for model in ALL),
    *((embedding_scale_has_two_decimals, model, torch.float32) for model in ALL),
    *((embedding_scale_is_not_rounded_to_the_run_dtype, model, torch.bfloat16) for model in ALL),
    *((attention_scale_is_head_dim, model, torch.float32) for model in (GEMMA2, VAULT)),
    (attention_scale_is_head_dim, GEMMA3, torch.float32),
    *((attention_cap_is_dropped, model, torch.float32) for model in (GEMMA2, VAULT)),
    *((attention_cap_after_the_mask, model, torch.float32) for model in (GEMMA2, VAULT)),
    *((final_cap_is_dropped, model, torch.float32) for model in (GEMMA2, VAULT, GEMMA4)),
    *((layer_order_is_reversed, model, torch.float32) for model in (GEMMA2, VAULT)),
    (layer_order_is_reversed, GEMMA3, torch.float32),
    (one_theta_for_all_layers, GEMMA3, torch.float32),
    (no_linear_factor, GEMMA3, torch.float32),
    (linear_factor_on_local_layers, GEMMA3, torch.float32),
    *((window_is_one_key_wider, model, torch.float32) for model in (GEMMA2, GEMMA3, VAULT, GEMMA4)),
    *((window_is_one_key_narrower, model, torch.float32) for model in (GEMMA2, GEMMA3)),
    (no_query_and_key_norm, GEMMA3, torch.float32),
    (norm_after_rotary, GEMMA3, torch.float32),
    *((no_norm_before_the_residual, model, torch.float32) for model in (GEMMA2, GEMMA3)),
    *((head_is_not_the_table, model, torch.float32) for model in ALL),
    *((values_share_heads_in_another_order, model, torch.float32) for model in (GEMMA2, GEMMA3)),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """model type -> tiny checkpoint; hidden size 80, whose root no dtype holds; a linear factor where there is one."""
    changes = {GEMMA3: {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}}
    folder = tmp_path_factory.mktemp("facts")
    found = {
        model: write_tiny_checkpoint(folder / model, model, hidden_size=80, **changes.get(model, {})) for model in ALL
    }
    for name, traits in ((PER_LAYER, TINY_PER_LAYER), (MIXTURE, TINY_EXPERTS)):
        found[name] = write_tiny_checkpoint(folder / name, GEMMA4, hidden_size=80, **traits)
    return found


@pytest.fixture(scope="module")
def expected(checkpoints):
    """(model type, dtype) -> weights and logits of the stock class, and the tokens; made once."""
    ids = torch.randint(3, 500, (1, 40), generator=torch.Generator().manual_seed(5))

    @functools.cache
    def get(model_type, dtype):
        path = checkpoints[model_type]
        eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
        stock = AutoModelForCausalLM.from_pretrained(path, **eager, dtype=dtype).eval()
        return stock.state_dict(), logits(stock, ids), ids

    return get


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(
    ("broken", "model_type", "dtype"), BREAKAGES, ids=[f"{one.__name__}-{model}" for one, model, _ in BREAKAGES]
)
def test_a_broken_fact_is_seen(checkpoints, expected, monkeypatch, broken, model_type, dtype):
    weights, right, ids = expected(model_type, dtype)
    patched = patched_causal(Checkpoint.open(checkpoints[model_type]).config).to_empty(device="cpu").to(dtype).eval()
    patched.tie_weights()
    patched.load_state_dict(weights)
    assert torch.equal(right, logits(patched, ids))
    broken(patched, monkeypatch)
    assert not torch.equal(right, logits(patched, ids))
