"""Object detection and instance segmentation with Mask R-CNN on a Vision Transformer, in COCO's format."""
