"""Parameters by name: paths, masks, counts, and strict comparison of structures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyjax import tree
from tinyjax.errors import UserError

PARAMS = {
    "embedding": {"table": np.zeros((5, 2), np.float32)},
    "layers": {
        "attention": {"query": {"kernel": np.ones((3, 2, 1), np.float32), "bias": np.ones(3, np.float32)}},
        "mlp": {"out": {"kernel": np.full((3, 2), 2, np.float32)}},
        "mlp_norm": {"scale": np.ones((3, 2), np.float32)},
    },
    "norm": {"scale": np.ones(2, np.float32)},
}

NAMES = st.text("abz019_", min_size=1, max_size=4)
TREES = st.recursive(
    st.dictionaries(NAMES, st.integers(), min_size=1, max_size=4),
    lambda children: st.dictionaries(NAMES, st.integers() | children, min_size=1, max_size=4),
    max_leaves=20,
)


@given(TREES)
def test_flatten_and_unflatten_are_inverse(nested):
    leaves = tree.flatten(nested)
    assert tree.unflatten(leaves) == nested
    assert tree.unflatten(dict(reversed(leaves.items()))) == nested
    assert [path.split("/") for path in leaves] == sorted(path.split("/") for path in leaves)
    assert list(leaves.values()) == jax.tree.leaves(nested)


def test_an_empty_tree():
    assert tree.flatten({}) == tree.unflatten({}) == {}
    assert tree.count({}) == tree.nbytes({}) == 0


def test_order_is_that_of_components_not_of_text():
    """As text, "a-b/x" comes before "a/x"; JAX sorts the keys of each dict."""
    nested = {"a": {"x": 1}, "a-b": {"x": 2}}
    assert list(tree.flatten(nested).values()) == jax.tree.leaves(nested) == [1, 2]


def test_map_named_hands_over_paths_and_matching_leaves():
    doubled = jax.tree.map(lambda x: 2 * x, PARAMS)
    seen = []

    def add(path, a, b):
        seen.append(path)
        return a + b

    sums = tree.map_named(add, PARAMS, doubled)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(3 * x, y), PARAMS, sums)
    assert seen == list(tree.flatten(PARAMS))


def test_get_names_the_nearest_path():
    assert tree.get(PARAMS, "norm/scale").shape == (2,)
    with pytest.raises(UserError, match="no parameter norm/scales; did you mean norm/scale"):
        tree.get(PARAMS, "norm/scales")
    with pytest.raises(UserError, match="no parameter norm"):
        tree.get(PARAMS, "norm")


def test_masks_are_searched_in_the_path():
    marked = tree.flatten(tree.mask(PARAMS, ("kernel$", "^norm"), "decay"))
    assert {path for path, chosen in marked.items() if chosen} == {
        "layers/attention/query/kernel",
        "layers/mlp/out/kernel",
        "norm/scale",
    }
    assert jax.tree.structure(tree.mask(PARAMS, (), "decay")) == jax.tree.structure(PARAMS)
    assert not any(tree.flatten(tree.mask(PARAMS, (), "decay")).values())


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [("kernels$", "matches no parameter"), ("layers/mlp_norm/scal$", "did you mean layers/mlp_norm/scale"),
     ("(", "is not a regular expression")],
)  # fmt: skip
def test_a_pattern_that_would_do_nothing_is_refused(pattern, reason):
    with pytest.raises(UserError, match=reason) as caught:
        tree.mask(PARAMS, ("kernel$", pattern), "optimizer.decay_paths")
    assert str(caught.value).startswith("optimizer.decay_paths: ")
    assert "\n" not in str(caught.value)


def test_sizes_of_arrays_and_of_specs():
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), PARAMS)
    assert tree.count(PARAMS) == tree.count(spec) == 10 + 6 + 3 + 6 + 6 + 2
    assert tree.nbytes(PARAMS) == 2 * tree.nbytes(spec) == 4 * tree.count(PARAMS)


def test_groups_sum_to_the_whole_and_ignore_the_form_of_the_stack():
    assert tree.groups(PARAMS) == {
        "embedding": 10,
        "layers/attention": 9,
        "layers/mlp": 6,
        "layers/mlp_norm": 6,
        "norm": 2,
    }
    unrolled = PARAMS | {
        "layers": {str(i): jax.tree.map(lambda x, i=i: x[i], PARAMS["layers"]) for i in range(3)},
    }
    assert tree.groups(unrolled) == tree.groups(PARAMS)
    assert sum(tree.groups(PARAMS).values()) == tree.count(PARAMS)


class TestSameStructure:
    def message(self, found):
        with pytest.raises(UserError) as caught:
            tree.check_same_structure(PARAMS, found, "file.npz")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def changed(self, **leaves):
        flat = tree.flatten(PARAMS)
        for path, leaf in leaves.items():
            flat[path.replace("__", "/")] = leaf
        return tree.unflatten({p: leaf for p, leaf in flat.items() if leaf is not None})

    def test_equal_structures_pass_arrays_or_specs(self):
        tree.check_same_structure(PARAMS, jax.tree.map(jnp.asarray, PARAMS), "file.npz")
        tree.check_same_structure(jax.eval_shape(lambda: PARAMS), PARAMS, "file.npz")

    def test_a_renamed_leaf_is_missing_and_unexpected(self):
        message = self.message(self.changed(norm__scale=None, norm__scales=np.ones(2, np.float32)))
        assert message.startswith("file.npz: ")
        assert "missing norm/scale; did you mean norm/scales?" in message
        assert "unexpected norm/scales; did you mean norm/scale?" in message

    @pytest.mark.parametrize("leaf", [np.ones(3, np.float32), np.ones((1, 2), np.float32), np.ones(2, np.float16)])
    def test_another_shape_or_dtype_is_told(self, leaf):
        message = self.message(self.changed(norm__scale=leaf))
        assert f"norm/scale is {leaf.dtype}{list(leaf.shape)}, expected float32[2]" in message

    def test_many_differences_are_counted(self):
        assert self.message({"other": np.ones(1)}).endswith("(and 4 more)")
