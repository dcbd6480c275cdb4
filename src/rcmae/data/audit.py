"""`rcmae check`: what a folder holds, before any training."""
