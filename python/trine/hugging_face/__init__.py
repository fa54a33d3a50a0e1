"""Models of transformers: BitNet checkpoints on trine's kernels."""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError("trine.hugging_face needs transformers; pip install transformers") from error

from trine.hugging_face.bitnet import from_bitnet

__all__ = ["from_bitnet"]
