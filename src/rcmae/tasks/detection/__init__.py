"""Mask R-CNN on a Vision Transformer: boxes and masks of objects, in COCO's layout."""
