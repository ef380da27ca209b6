"""Sampling by recomputing the whole row for every token: for short texts of tiny models, without a cache."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinyjax.data.prepare import Prepared
from tinyjax.models.model import Model
from tinyjax.train.run_config import Config


def choose(logits_BV, key, temperature: float, top_p: float):
    """Return token_B drawn from softmax(logits / temperature), cut to the likeliest tokens that together hold top_p.

    temperature 0 takes the likeliest. Top-p (Holtzman et al. 2019): a token stays if those before it hold less than
    top_p, so the likeliest always stays.
    """
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1)
    logits_BV = logits_BV / temperature
    if top_p < 1:
        order_BV = jnp.argsort(-logits_BV, axis=-1)
        p_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
        before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
        rank_BV = jnp.argsort(order_BV, axis=-1)
        logits_BV = jnp.where(jnp.take_along_axis(before_BV < top_p, rank_BV, axis=-1), logits_BV, -jnp.inf)
    return jax.random.categorical(key, logits_BV, axis=-1)


@functools.partial(jax.jit, static_argnames=("model", "new", "temperature", "top_p", "banned"))
def continue_rows(model: Model, params: Any, tokens_BS, length: int, key, *, new: int, temperature, top_p, banned):
    """Return tokens_BS with `new` tokens sampled from position `length` on; `banned` ids are never drawn."""
    b, s = tokens_BS.shape
    positions_BS = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32)[None], (b, s))
    batch = {"positions": positions_BS, "segment_ids": jnp.ones((b, s), jnp.int32)}

    def one(i, tokens_BS):
        logits_BSV = model.logits(params, batch | {"tokens": tokens_BS})
        logits_BV = jax.lax.dynamic_index_in_dim(logits_BSV, length + i - 1, axis=1, keepdims=False)
        logits_BV = logits_BV.at[:, jnp.asarray(banned, jnp.int32)].set(-jnp.inf)
        token_B = choose(logits_BV, jax.random.fold_in(key, i), temperature, top_p)
        return jax.lax.dynamic_update_slice(tokens_BS, token_B[:, None].astype(jnp.int32), (0, length + i))

    return jax.lax.fori_loop(0, new, one, tokens_BS)


def samples(model: Model, params: Any, prepared: Prepared, config: Config) -> list[str]:
    """Return the texts that the evaluation config asks for, each up to the end of its document.

    The prompt keeps its last tokens when it does not fit the sequence length beside the new ones.
    """
    asked, tokenizer = config.evaluation, prepared.tokenizer
    if not asked.samples:
        return []
    new = min(asked.sample_tokens, config.data.sequence)
    prompt = [tokenizer.bos_id, *tokenizer.encode(asked.prompt).tolist()]
    prompt = prompt[-max(1, config.data.sequence - new + 1) :]
    tokens_BS = np.zeros((asked.samples, len(prompt) + new), np.int32)
    tokens_BS[:, : len(prompt)] = prompt
    out = continue_rows(
        model,
        params,
        jnp.asarray(tokens_BS),
        len(prompt),
        jax.random.key(config.train.seed),
        new=new,
        temperature=asked.temperature,
        top_p=asked.top_p,
        banned=(tokenizer.bos_id,),
    )
    texts = []
    for row in np.asarray(out)[:, len(prompt) :]:
        ends = np.flatnonzero(row == tokenizer.eos_id)
        texts.append(asked.prompt + tokenizer.decode(row[: ends[0]] if len(ends) else row))
    return texts
