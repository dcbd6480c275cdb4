"""The tasks of `rcmae evaluate`, by name."""

from .attentive import Attentive
from .base import Task
from .finetune import FineTune
from .knn import KNN
from .linear import Linear
from .robustness import Robustness

TASKS: dict[str, type[Task]] = {task.name: task for task in (KNN, Linear, Attentive, FineTune, Robustness)}
