"""Paths of leaves in pytrees."""

import jax


def leaf_path(path: tuple) -> str:
    """Returns a key path of JAX's as people write it: `blocks/mlp/up/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_by_path(tree) -> dict:
    """Returns `{"blocks/mlp/up/kernel": leaf, ...}` of any pytree."""
    return {leaf_path(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
