"""The suite of the built-in world: questions, captions and retrieval on held-out scenes, and text-only questions.

Everything runs for any parameters of a student, so the same function gives the figures before and after distillation.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlkd_jax.data.images import normalize_pixels, resize_and_crop
from vlkd_jax.errors import UserError
from vlkd_jax.evals.captions import f1, scene_match
from vlkd_jax.evals.retention import PROMPT, answer_texts, text_questions
from vlkd_jax.evals.retrieval import text_to_image_hits
from vlkd_jax.evals.statistics import interval
from vlkd_jax.evals.vqa import exact_match, plain
from vlkd_jax.predict import Predictor
from vlkd_jax.shapes import world
from vlkd_jax.types import Params

Result = tuple[dict[str, Any], list[dict[str, Any]]]
"""(metrics, predictions): fractions between 0 and 1, and one dict an item."""


class ShapesSuite:
    """Holds the suite's scenes and the teacher's image tokens of them, which no student changes.

    Args:
      suite: `config.shapes` of configs/suites.py.

    Raises:
      UserError: an unknown split, or nothing to ask.
    """

    def __init__(self, suite: ConfigDict, predictor: Predictor):
        if suite.split not in world.SPLITS:
            raise UserError(f"config.shapes.split is {suite.split!r}; it is one of {', '.join(world.SPLITS)}")
        for field in ("questions", "captions", "retrieval", "text_questions"):
            if suite[field] < 1:
                raise UserError(f"config.shapes.{field} is {suite[field]}; it must be at least 1")
        self.suite, self.predictor = suite, predictor
        self.questions = list(world.question_set(suite.seed, suite.split, suite.questions))
        self.scenes = [world.make_scene(suite.seed, suite.split, i) for i in self._scene_indices()]
        size = world.IMAGE_SIZE if predictor.image_size is None else predictor.image_size
        pictures = (normalize_pixels(resize_and_crop(world.render(scene), size)) for scene in self.scenes)
        self.tokens, self.embeddings = predictor.encode_images(pictures)

    def _scene_indices(self) -> range:
        asked = 1 + max(index for index, _, _ in self.questions)
        return range(max(asked, self.suite.captions, self.suite.retrieval))

    def vqa(self, params: Params, blind: bool = False) -> Result:
        """Zero-shot answers, overall and by question type; `blind` takes the image prefix away."""
        text, suite = self.predictor.text, self.suite
        sources, prefixes = [], []
        for _, _, question in self.questions:
            sources.append(text.encode_template(suite.question_encoder, question=question.question))
            prefixes.append(text.encode_template(suite.question_decoder, question=question.question))
        images = [index for index, _, _ in self.questions]
        tokens = None if blind else self.tokens
        answers = self.predictor.generate(params, sources, prefixes, suite.answer_tokens, tokens, images)
        rows = [
            {
                "task": "vqa_blind" if blind else "vqa",
                "id": f"{suite.split}-{number}",
                "image": index,
                "type": question.kind,
                "prompt": suite.question_decoder.format(question=question.question),
                "raw": answer,
                "normalised": plain(answer),
                "answers": [question.answer],
                "score": float(exact_match(answer, question.answer)),
            }
            for number, ((index, _, question), answer) in enumerate(zip(self.questions, answers, strict=True))
        ]
        return _by_type(rows), rows

    def majority(self) -> dict[str, float]:
        """Accuracy of always giving the most frequent answer of the question's type, counted on these questions."""
        counts: dict[str, Counter] = {}
        for _, _, question in self.questions:
            counts.setdefault(question.kind, Counter())[question.answer] += 1
        best = {kind: count.most_common(1)[0][1] for kind, count in counts.items()}
        shares = {kind: best[kind] / counts[kind].total() for kind in counts}
        return shares | {"overall": sum(best.values()) / len(self.questions)}

    def captions(self, params: Params) -> Result:
        """Captions after the forced prefix: exact scene match and attribute F1 (`evals.captions.scene_match`)."""
        text, suite = self.predictor.text, self.suite
        scenes = self.scenes[: suite.captions]
        source, prefix = text.encode_template(suite.caption_encoder), text.encode_template(suite.caption_decoder)
        count = len(scenes)
        sources, prefixes = [source] * count, [prefix] * count
        raw = self.predictor.generate(params, sources, prefixes, suite.caption_tokens, self.tokens[:count])
        matches = np.array([scene_match(caption, scene) for caption, scene in zip(raw, scenes, strict=True)], float)
        rows = [
            {
                "task": "caption",
                "id": f"{suite.split}-{index}",
                "image": index,
                "prompt": suite.caption_decoder,
                "raw": caption,
                "normalised": plain(caption),
                "answers": [", ".join(" ".join(t.attributes) for t in scene.things)],
                "score": f1(*match[1:]),
            }
            for index, (caption, scene, match) in enumerate(zip(raw, scenes, matches, strict=True))
        ]
        images = range(count)
        total = matches.sum(0)
        metrics = {
            "exact_match": float(total[0] / count),
            "exact_match_interval": interval(matches[:, 0], images),
            "attribute_f1": f1(*total[1:]),
            "attribute_f1_interval": interval(matches[:, 1:], images, lambda t: f1(*t[:3])),
            "distinct": len(set(raw)) / count,
            "n": count,
        }
        return metrics, rows

    def retrieval(self, params: Params) -> dict[str, Any]:
        """R@1 of complete captions against the teacher's embeddings of distinct scenes, by both text towers."""
        chosen: dict[tuple, int] = {}
        for index, scene in enumerate(self.scenes[: self.suite.retrieval]):
            chosen.setdefault(tuple(t.attributes for t in scene.things), index)
        indices = list(chosen.values())
        seed, split = self.suite.seed, self.suite.split
        texts = [world.caption(self.scenes[i], world.generator(seed, split, i, 5), complete=1.0) for i in indices]
        images = self.embeddings[indices]
        student = text_to_image_hits(self.predictor.embed_texts(params, texts), images)
        teacher = text_to_image_hits(self.predictor.embed_texts_clip(texts), images)
        return {
            "r_at_1": float(student.mean()),
            "r_at_1_interval": interval(student, indices),
            "clip_r_at_1": float(teacher.mean()),
            "n": len(indices),
        }

    def text_qa(self, params: Params) -> Result:
        """Questions answered from a written description, without an image: the ability that has to stay."""
        suite = self.suite
        items = text_questions(suite.seed, suite.split, suite.text_questions)
        scenes = [index for index, _, _ in world.question_set(suite.seed, suite.split, suite.text_questions)]
        answers = answer_texts(self.predictor, params, items, suite.answer_tokens)
        rows = [
            {
                "task": "text_qa",
                "id": f"{suite.split}-text-{number}",
                "image": scene,
                "type": question.kind,
                "prompt": f"{description} {PROMPT.format(question=question.question)}",
                "raw": answer,
                "normalised": plain(answer),
                "answers": [question.answer],
                "score": float(exact_match(answer, question.answer)),
            }
            for number, ((description, question), scene, answer) in enumerate(zip(items, scenes, answers, strict=True))
        ]
        return _by_type(rows), rows

    def run(self, params: Params, blind: bool = False) -> Result:
        """All of it; with `blind` also the questions without the image. Metrics by task."""
        vqa, rows = self.vqa(params)
        captions, caption_rows = self.captions(params)
        text_qa, text_rows = self.text_qa(params)
        metrics = {"vqa": vqa, "caption": captions, "text_qa": text_qa, "retrieval": self.retrieval(params)}
        rows = rows + caption_rows + text_rows
        if blind:
            metrics["vqa_blind"], blind_rows = self.vqa(params, blind=True)
            rows += blind_rows
        return metrics, rows


def _by_type(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean score with its interval, overall and for each type."""
    scores, images = np.array([row["score"] for row in rows]), np.array([row["image"] for row in rows])
    metrics: dict[str, Any] = {
        "overall": float(scores.mean()),
        "overall_interval": interval(scores, images),
        "n": len(rows),
        "by_type": {},
    }
    for kind in dict.fromkeys(row["type"] for row in rows):
        chosen = np.array([row["type"] == kind for row in rows])
        metrics["by_type"][kind] = {
            "accuracy": float(scores[chosen].mean()),
            "interval": interval(scores[chosen], images[chosen]),
            "n": int(chosen.sum()),
        }
    return metrics
