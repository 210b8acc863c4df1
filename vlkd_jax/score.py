"""Scores predictions from files, ours or another system's, by the rules that the suites use. No model is needed.

`python -m vlkd_jax.score --suite=vqav2 --predictions=FILE --annotations=FILE [--questions=FILE] [--json]`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vlkd_jax import console, entry
from vlkd_jax.commands import COMMANDS
from vlkd_jax.errors import UserError
from vlkd_jax.evals.caption_suite import score_captions
from vlkd_jax.evals.scoring import KINDS, SUITES, Files, judged_rows
from vlkd_jax.evals.summary_suite import ROUGE
from vlkd_jax.runtime import tell

CAPTION_FIGURES = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE")
RULES = {
    "official": "official: leave one out, normalise where the humans differ",
    "lavis": "LAVIS",
    "lmms_eval_vqav2": "lmms-eval, task vqav2",
    "lmms_eval_ok_vqa": "lmms-eval, task ok_vqa",
    "no_leave_one_out": "nobody left out: min(matches / 3, 1)",
}
"""What `evals.vqa.RULES` are called in the table."""


def score(files: Files, spice_jars: Path | None = None) -> dict[str, Any]:
    """What `vlkd score --json` prints: figures, scorer, files with their sha256, n.

    VQA and summaries are in per cent, captions are fractions, as the standard tools print them.

    Raises:
      UserError: see `scoring.judged_rows`.
    """
    rows, about = judged_rows(files)
    kind = KINDS[files.suite]
    metrics = score_captions(rows, spice_jars) if kind == "caption" else SUITES[kind].score(rows)
    about = {"suite": files.suite, **about, "files": files.hashes(), "date": time.strftime("%Y-%m-%d")}
    about["versions"] = {name: version(name) for name in ("vlkd_jax", "numpy")}
    return {"vqa": _vqa, "caption": _captions, "summary": _summaries}[kind](metrics) | about


def _percent(value: float | Sequence[float]) -> Any:
    return 100 * value if isinstance(value, float) else [100 * part for part in value]


def _vqa(metrics: dict[str, Any]) -> dict[str, Any]:
    result = {"overall": _percent(metrics["overall"]), "overall_interval": _percent(metrics["overall_interval"])}
    for kind in ("answer_type", "question_type"):
        of_type = metrics.get(f"by_{kind}", {})
        result[f"per_{kind}"] = {name: _percent(figures["accuracy"]) for name, figures in of_type.items()}
        result[f"per_{kind}_n"] = {name: figures["n"] for name, figures in of_type.items()}
    result["rules"] = {name: _percent(value) for name, value in metrics["rules"].items()}
    return result | {name: metrics[name] for name in ("n", "other_than_ten", "scorer") if name in metrics}


def _captions(metrics: dict[str, Any]) -> dict[str, Any]:
    return {"METEOR": None} | metrics


def _summaries(metrics: dict[str, Any]) -> dict[str, Any]:
    figures = {name: _percent(value) for name, value in metrics.items() if name.startswith("rouge")}
    return figures | {name: value for name, value in metrics.items() if not name.startswith("rouge")}


def table(result: dict[str, Any]) -> str:
    """The same for people."""
    if "overall" in result:
        lines = _vqa_lines(result)
    elif "rouge1" in result:
        lines = [console.table((name, f"{result[name]:.3f}", _bounds(result[f"{name}_interval"])) for name in ROUGE)]
    else:
        lines = _caption_lines(result)
    lines += ["", f"{result['n']:,} scored by {result['scorer']}; brackets: 95% intervals"]
    if "missing" in result:
        lines.append(f"{result['missing']:,} of the split have no prediction and are not in these figures")
    if "other_than_ten" in result:
        lines.append(f"{result['other_than_ten']:,} questions have other than ten human answers")
    if "answer_field" in result:
        stated = result["annotation_version"] or "not stated"
        lines.append(f"annotations: {stated}; field {result['answer_field']} of each human answer")
    lines += [f"{name}: not computed, {why}" for name, why in result.get("not_computed", {}).items()]
    lines += [f"{name}: {file['path']}, sha256 {file['sha256'][:16]}..." for name, file in result["files"].items()]
    return "\n".join(lines)


def _vqa_lines(result: dict[str, Any]) -> list[str]:
    lines = [console.table([("VQA accuracy", f"{result['overall']:.2f}", _bounds(result["overall_interval"], 2))])]
    for kind in ("answer_type", "question_type"):
        figures, counts = result[f"per_{kind}"], result[f"per_{kind}_n"]
        if figures:
            lines += ["", console.table((name, f"{figures[name]:.2f}", f"n = {counts[name]:,}") for name in figures)]
    lines += ["", "the same answers by other programs' rules:"]
    return [*lines, console.table((RULES[name], f"{value:.2f}") for name, value in result["rules"].items())]


def _caption_lines(result: dict[str, Any]) -> list[str]:
    names = [name for name in CAPTION_FIGURES if result.get(name) is not None]
    domains = result.get("by_domain")
    columns = (domains or {"": result}).values()
    rows = [(name, *(f"{figures[name]:.5f}" for figures in columns)) for name in names]
    if not domains:
        rows.append(("95% interval of CIDEr", _bounds(result["CIDEr_interval"], 5)))
        return [console.table(rows), "", f"document frequencies of CIDEr: {result['document_frequencies']}"]
    rows.append(("CIDEr, frequencies of entire", *map(_of_entire, columns)))
    rows.append(("n", *(f"{figures['n']:,}" for figures in columns)))
    told = "document frequencies of CIDEr: each column's own references, but where it says entire"
    return [console.table(rows, ("", *domains)), "", told]


def _of_entire(figures: dict[str, Any]) -> str:
    return f"{figures.get('CIDEr_entire_frequencies', figures['CIDEr']):.5f}"


def _bounds(bounds: Sequence[float], digits: int = 3) -> str:
    return f"[{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"


def files_given(predictions: Path, values: SimpleNamespace) -> Files:
    """These predictions with what the options say. Raises UserError for options that have no meaning together."""
    if values.questions and KINDS[values.suite] != "vqa":
        raise UserError(f"--questions is of VQA; leave it out for --suite={values.suite}")
    return Files(
        suite=values.suite,
        predictions=predictions,
        annotations=Path(values.annotations),
        questions=Path(values.questions) if values.questions else None,
        split=values.split,
        answer_field=values.answer_field,
        allow_partial=values.allow_partial,
    )


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    result = score(
        files_given(Path(values.predictions), values), Path(values.spice_jars) if values.spice_jars else None
    )
    tell(json.dumps(result, indent=1) if values.json else table(result))


if __name__ == "__main__":
    entry.run(main, COMMANDS["score"])
