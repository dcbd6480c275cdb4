"""The methods by name. A new method needs a file and a line here, a recipe, a page in docs/methods, and
tests."""

from .base import Method
from .data2vec import Data2Vec
from .dino import DINO
from .ibot import IBOT
from .mae import MAE
from .mocov3 import MoCoV3
from .msn import MSN
from .rcmae import RCMAE

METHODS: dict[str, type[Method]] = {
    "mae": MAE,
    "rcmae": RCMAE,
    "dino": DINO,
    "ibot": IBOT,
    "msn": MSN,
    "mocov3": MoCoV3,
    "data2vec": Data2Vec,
}
