"""The methods by name. Adding one: a file here, a line here, a recipe, a page in docs/methods and its tests."""

from .base import Method
from .mae import MAE
from .rcmae import RCMAE

METHODS: dict[str, type[Method]] = {"mae": MAE, "rcmae": RCMAE}
