"""The decoder with RMSNorm, RoPE, grouped heads and SwiGLU is Llama: equal logits from Hugging Face's weights."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tinyjax import tree
from tinyjax.models import layers
from tinyjax.models.attention import GroupedQuery
from tinyjax.models.feed_forward import Gated
from tinyjax.models.model import Model
from tinyjax.models.norms import RMSNorm
from tinyjax.models.position import Rotary
from tinyjax.models.transformer import Transformer

REASON = "the comparison with Llama needs PyTorch and transformers: pip install 'tinyjax[rivals]'"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

pytestmark = pytest.mark.rivals

V = 53
CASES = {
    "grouped, untied": {"heads": 4, "kv_heads": 2, "head_width": 6, "tied": False},
    "one kv head, tied": {"heads": 2, "kv_heads": 1, "head_width": 10, "tied": True},
    "all heads, tied": {"heads": 3, "kv_heads": 3, "head_width": 8, "tied": True},
}


def ours(heads, kv_heads, head_width, tied):
    return Transformer(
        depth=2,
        width=24,
        attention=GroupedQuery(heads=heads, kv_heads=kv_heads, head_width=head_width),
        mlp=Gated(hidden=40),
        norm=RMSNorm(eps=1e-5),
        position=Rotary(base=500.0),
        tied=tied,
    )


def theirs(config, seed=0):
    """Return a LlamaForCausalLM of the same shape, its weights large enough for attention to matter."""
    torch.manual_seed(seed)
    a = config.attention
    settings = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=config.width,
        intermediate_size=config.mlp.hidden,
        num_hidden_layers=config.depth,
        num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads,
        head_dim=a.head_width,
        max_position_embeddings=64,
        rms_norm_eps=config.norm.eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.position.base},
        tie_word_embeddings=config.tied,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(settings).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model


def copied(model, config):
    """Return the weights of a LlamaForCausalLM as our parameters: torch's [out, in] become [in, out], by heads."""
    weights = {name: x.detach().numpy() for name, x in model.named_parameters()}
    d, a = config.width, config.attention.head_width

    def layer(i):
        def take(name):
            return weights[f"model.layers.{i}.{name}.weight"]

        return {
            "attention": {
                **{
                    n: {"kernel": take(f"self_attn.{n[0]}_proj").T.reshape(d, -1, a)} for n in ("query", "key", "value")
                },
                "out": {"kernel": take("self_attn.o_proj").T.reshape(-1, a, d)},
            },
            "mlp": {
                n: {"kernel": take(f"mlp.{t}_proj").T} for n, t in (("gate", "gate"), ("up", "up"), ("out", "down"))
            },
            "attention_norm": {"scale": take("input_layernorm")},
            "mlp_norm": {"scale": take("post_attention_layernorm")},
        }

    params = {
        "embedding": {"table": weights["model.embed_tokens.weight"]},
        "layers": {str(i): layer(i) for i in range(config.depth)},
        "norm": {"scale": weights["model.norm.weight"]},
    }
    if not config.tied:
        params["head"] = {"table": weights["lm_head.weight"]}
    return layers.stack(params)


def logits(config, params, tokens_BS):
    positions_BS = np.tile(np.arange(tokens_BS.shape[1], dtype=np.int32), (tokens_BS.shape[0], 1))
    batch = {"tokens": tokens_BS.astype(np.int32), "positions": positions_BS}
    return np.asarray(Model(config, V, jnp.dtype("float32")).logits(params, batch))


def expected(model, tokens_BS):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens_BS)).logits.numpy()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("s", [1, 13])
def test_logits_are_those_of_llama(case, s):
    config = ours(**CASES[case])
    model = theirs(config)
    params = copied(model, config)
    tree.check_same_structure(Model(config, V, jnp.dtype("float32")).abstract(), params, "Llama")
    tokens_BS = np.random.RandomState(0).randint(0, V, (2, s))
    want = expected(model, tokens_BS)
    # 2 layers of about 10 dependent roundings each, on logits of a deviation of several units.
    tolerance = 100 * float(jnp.finfo(jnp.float32).eps) * np.abs(want).max()
    np.testing.assert_allclose(logits(config, params, tokens_BS), want, rtol=0, atol=tolerance)


@dataclasses.dataclass(frozen=True)
class Interleaved(Rotary):
    """RoPE with neighbours paired, as in the original paper and GPT-J; not what Llama's Hugging Face weights expect."""

    def rotate(self, x_BSHA, tables):
        cos, sin = tables
        a, b = x_BSHA[..., ::2], x_BSHA[..., 1::2]
        return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x_BSHA.shape)


@pytest.mark.parametrize(
    "change",
    [
        {"position": Interleaved(base=500.0)},
        {"position": Rotary(base=10000.0)},
        {"norm": RMSNorm(eps=0.1)},
        {"mlp": Gated(hidden=40, activation="gelu")},
    ],
    ids=["interleaved rope", "another base", "another eps", "another activation"],
)
def test_another_architecture_is_seen(change):
    config = ours(**CASES["grouped, untied"])
    model = theirs(config)
    tokens_BS = np.random.RandomState(0).randint(0, V, (2, 13))
    want = expected(model, tokens_BS)
    found = logits(dataclasses.replace(config, **change), copied(model, config), tokens_BS)
    assert np.abs(found - want).max() > 0.01 * np.abs(want).max()
