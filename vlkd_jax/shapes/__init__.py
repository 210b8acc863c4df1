"""The built-in world; `models/` holds its CLIP and BART as Hugging Face directories."""
