"""Reads exports as a torch user does: `python read_export.py class|trust_remote_code OUT.npz NAME=HF ...`."""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def outputs(model, processor, directory: Path) -> dict[str, np.ndarray]:
    """Logits, embeddings and texts of two questions about two pictures, and of the stock BART."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    images = [Image.new("RGB", (40, 30), "red"), Image.linear_gradient("L").resize((30, 50))]
    inputs = processor(images=images, questions=["what color is it?", "how many circles are there in the picture?"])
    stock = AutoModelForSeq2SeqLM.from_pretrained(directory / "bart", dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(directory / "bart")("a large red circle", return_tensors="pt")
    with torch.inference_mode():
        greedy = model.generate(**inputs, max_new_tokens=8)
        beam = model.generate(**inputs, max_new_tokens=8, num_beams=3)
        logits = model(**{k: v for k, v in inputs.items() if not k.startswith("decoder")}, labels=greedy).logits
        captions = model.generate(**processor(images=images), max_new_tokens=8)
        return {
            "pixels": inputs["pixel_values"].numpy(),
            "logits": logits.numpy(),
            "image": model.embed_images(inputs["pixel_values"]).numpy(),
            "text": model.embed_texts(**processor(texts=["a red circle", "two"])).numpy(),
            "stock": stock(input_ids=tokens["input_ids"], decoder_input_ids=tokens["input_ids"]).logits.numpy(),
            **{name: ids.numpy() for name, ids in (("greedy", greedy), ("beam", beam), ("captions", captions))},
        }


def main(how: str, path: str, *places: str) -> None:
    """Writes `outputs` of each in float32, the dtype it says, the release of transformers and the class's module."""
    import transformers

    if how == "class":
        from vlkd_jax.hf.modeling_vlkd import VLKDForConditionalGeneration as Model
        from vlkd_jax.hf.modeling_vlkd import VLKDProcessor as Processor

        options = {}
    else:
        from transformers import AutoModel as Model
        from transformers import AutoProcessor as Processor

        options = {"trust_remote_code": True}
    written = {"release": transformers.__version__}
    for name, directory in (place.split("=") for place in places):
        model = Model.from_pretrained(directory, dtype=torch.float32, **options).eval()
        processor = Processor.from_pretrained(directory, **options)
        written["module"] = type(model).__module__
        written |= {f"{name} {part}": value for part, value in outputs(model, processor, Path(directory)).items()}
        written[f"{name} as stored"] = str(Model.from_pretrained(directory, dtype="auto", **options).dtype)
    np.savez(path, **written)


if __name__ == "__main__":
    main(*sys.argv[1:])
