"""Which kernel computes a pattern."""

from jaxgpt.config import ModelConfig
from jaxgpt.ops.attention import Kernel
from jaxgpt.ops.kernels import splash_attention
from jaxgpt.ops.sparse.gathered import gathered_attention
from jaxgpt.ops.sparse.lsh import lsh_attention
from jaxgpt.ops.sparse.patterns import Lsh, Pattern, patterns_of

SPARSE_KERNELS: dict[str, Kernel] = {
    "gathered": gathered_attention,
    "lsh": lsh_attention,
    "splash": splash_attention,
}


def sparse_kernel(kernel: str, pattern: Pattern | Lsh) -> str:
    """Returns the name of the kernel for a pattern where `kernel` is that of full attention: splash
    skips blocks that nobody sees; what it cannot skip, and elsewhere, XLA gathers."""
    if isinstance(pattern, Lsh):
        return "lsh"
    return "splash" if kernel == "splash" and pattern.in_blocks else "gathered"


def kernel_name(cfg: ModelConfig, kernel: str) -> str:
    """Returns what computes a model's attention, for people: `axial (gathered)`."""
    pattern = patterns_of(cfg)[True]
    return f"{cfg.attention_pattern} ({sparse_kernel(kernel, pattern)})" if pattern else kernel
