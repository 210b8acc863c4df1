"""CLIP and BART in Flax Linen, with Hugging Face's parameter names."""
