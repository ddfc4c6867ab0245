"""What images are compared by: any network that gives a vector for an image, resizing and normalising inside.

extractor.py      the contract, and any torch module behind it      registry.py  extractors by name
transformers.py, torchscript.py, clip.py, efficientnet.py           networks of others
softplus.py       smooth networks, whose gradient improves pictures
"""

from handful.features.extractor import FeatureExtractor, pixels
from handful.features.registry import extractor_skeleton, from_file, load_extractor
from handful.features.torchscript import from_torchscript
from handful.features.transformers import from_transformers

__all__ = [
    "FeatureExtractor",
    "extractor_skeleton",
    "from_file",
    "from_torchscript",
    "from_transformers",
    "load_extractor",
    "pixels",
]
