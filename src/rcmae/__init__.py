"""rcmae: self-supervised pre-training of Vision Transformers with RC-MAE."""

__version__ = "0.1.0"
