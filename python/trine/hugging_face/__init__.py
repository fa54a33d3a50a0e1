"""Models of transformers: trine as a quantisation method, BitNet checkpoints on its kernels.

Importing this registers the method; a checkpoint is read only after it.
"""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError("trine.hugging_face needs transformers; pip install transformers") from error

from trine.hugging_face.bitnet import from_bitnet
from trine.hugging_face.config import TrineConfig
from trine.hugging_face.quantizer import TrineQuantizer

__all__ = ["TrineConfig", "TrineQuantizer", "from_bitnet"]
