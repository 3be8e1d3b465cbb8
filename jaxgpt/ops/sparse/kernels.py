"""Which kernel computes a pattern."""

from collections.abc import Callable

from jaxgpt.ops.kernels import splash_attention
from jaxgpt.ops.sparse.gathered import gathered_attention
from jaxgpt.ops.sparse.lsh import lsh_attention
from jaxgpt.ops.sparse.patterns import Lsh, Pattern


def sparse_kernel(kernel: str, pattern: Pattern | Lsh) -> Callable:
    """Returns the kernel for a pattern where `kernel` is that of full attention: splash skips
    blocks that nobody sees; what it cannot skip, and elsewhere, XLA gathers."""
    if isinstance(pattern, Lsh):
        return lsh_attention
    return splash_attention if kernel == "splash" and pattern.in_blocks else gathered_attention
