"""Checksums: the same wherever an array lies, and another one after any single damage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tinyjax import sharding
from tinyjax.train.checksum import checksums

DTYPES = ["float32", "bfloat16", "float16", "int8", "uint8", "int32", "uint32"]


def array_of(dtype, shape=(8, 3, 5), seed=0):
    """Return random bits, any of them: NaNs, infinities and negative zeros among the floats."""
    random = np.random.RandomState(seed)
    dtype = jnp.dtype(dtype)
    return np.frombuffer(random.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def checksum(x):
    (found,) = checksums({"x": x}).values()
    return found


def flipped(x, bit):
    data = np.frombuffer(x.tobytes(), np.uint8).copy()
    data[bit // 8] ^= 1 << bit % 8
    return data.view(x.dtype).reshape(x.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_single_flipped_bit_is_seen(dtype):
    x = array_of(dtype)
    bits = np.random.RandomState(1).permutation(8 * x.nbytes)[:40].tolist()
    signs = [8 * x.itemsize * (i + 1) - 1 for i in (0, 7, x.size - 1)]
    damaged = {str(bit): flipped(x, bit) for bit in bits + signs}
    sums = list(checksums(damaged | {"whole": x}).values())
    assert len(set(sums)) == len(damaged) + 1 - (len(bits + signs) - len(damaged))


def test_any_flipped_boolean_is_seen():
    x = np.random.RandomState(0).rand(4, 5) < 0.5
    damaged = {str(i): np.where(np.arange(20).reshape(4, 5) == i, ~x, x) for i in range(20)}
    assert len(set(checksums(damaged | {"whole": x}).values())) == 21


@pytest.mark.parametrize("dtype", DTYPES)
def test_swapped_elements_are_seen_where_a_plain_sum_is_blind(dtype):
    x = array_of(dtype)
    swaps, flat = {}, x.reshape(-1)
    random = np.random.RandomState(2)
    for n in range(20):
        i, j = random.choice(flat.size, 2, replace=False)
        if flat[i : i + 1].tobytes() != flat[j : j + 1].tobytes():
            swapped = flat.copy()
            swapped[[i, j]] = swapped[[j, i]]
            swaps[str(n)] = swapped.reshape(x.shape)

    def plain(x):
        return int(np.frombuffer(x.tobytes(), np.uint8).sum())

    assert swaps
    assert all(plain(swapped) == plain(x) for swapped in swaps.values())
    assert checksum(x) not in checksums(swaps).values()


def test_damage_of_several_places_is_seen():
    x = array_of("float32", (64, 16))
    rolled = {"rows": np.roll(x, 1, axis=0), "columns": np.roll(x, 1, axis=1), "zeros": np.zeros_like(x)}
    rolled |= {
        "half": np.concatenate([x[:32], x[:32]]),
        "tail": np.concatenate([x[:-1], np.zeros((1, 16), np.float32)]),
    }
    assert len({checksum(x), *checksums(rolled).values()}) == 6


def test_negative_zero_and_the_bits_of_nan_count():
    assert checksum(np.float32([0.0])) != checksum(np.float32([-0.0]))
    quiet, other = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert checksum(quiet[None]) != checksum(other[None])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_the_sharding_does_not_matter(dtype):
    x = np.random.RandomState(0).rand(8, 16) < 0.5 if dtype == "bool" else array_of(dtype, (8, 16))
    mesh = sharding.data_mesh()
    places = [PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "data")]
    put = [jax.device_put(x, NamedSharding(mesh, place)) for place in places]
    assert len({checksum(x), *map(checksum, put)}) == 1


def test_every_kind_of_leaf_of_a_state_has_one():
    tree = {
        "scalar": jnp.int32(3),
        "key": jax.random.key(0),
        "empty": jnp.zeros((0, 3)),
        "nested": {"x": (jnp.ones(1), np.ones(2, np.float32))},
    }
    found = checksums(tree)
    assert len(found) == 5
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in found.values())
    assert found["['key']"] != checksums({"key": jax.random.key(1)})["['key']"]
    assert found == checksums(tree)


def test_values_are_what_they_have_always_been():
    """They are stored in checkpoints: a change here makes every old checkpoint look damaged."""
    x = (np.arange(6, dtype=np.float32) - 2.5).reshape(2, 3)
    bits, index = x.view(np.uint32).astype(np.uint64).ravel(), np.arange(6, dtype=np.uint64)
    mask = np.uint64(0xFFFFFFFF)
    first = int((bits * (2 * index + 1)).sum() & mask)
    mixed = (bits ^ (bits >> np.uint64(16))) * np.uint64(0x85EBCA6B) & mask
    weight = (index * np.uint64(0x9E3779B1) & mask) | np.uint64(1)
    second = int(((mixed ^ (mixed >> np.uint64(13))) * weight & mask).sum() & mask)
    assert checksum(x) == f"{first:08x}{second:08x}"
