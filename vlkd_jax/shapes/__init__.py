"""The built-in world: scenes and texts, its suite, demo and report; `models/` holds its CLIP and BART."""
