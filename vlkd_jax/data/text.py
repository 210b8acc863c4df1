"""Text in and out of token ids: the two tokenizers, prompts with a mask, and BART's text infilling.

Text from users and data sets can never become a special token: it is tokenised with special tokens split into plain
characters, and `<s>`, `</s>` and `<mask>` are added as ids.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

import numpy as np

from vlkd_jax.errors import UserError

PROMPT_FIELDS = {
    "question_encoder": ("question",),
    "question_decoder": ("question",),
    "caption_encoder": (),
    "caption_decoder": (),
}
"""Prompts, and what is filled into each."""


def check_template(field: str, template: str, names: tuple[str, ...]) -> None:
    """Raises UserError naming `field` where something else than `names` would be filled into its template."""
    try:
        filled = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        template.format(**{name: 1 if name == "image_id" else "why?" for name in names})
        unknown = set(filled) - set(names)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as e:
        raise _wrong_template(field, template, names) from e
    if unknown:  # {question.attribute}
        raise _wrong_template(field, template, names)


def _wrong_template(field: str, template: str, names: tuple[str, ...]) -> UserError:
    told = f"only {' and '.join(f'{{{name}}}' for name in names)} is filled in" if names else "nothing is filled in"
    return UserError(f"{field}={template!r}: {told} there; a brace that is meant is written twice")


class BartText:
    """The student's byte-level BPE, read from a Hugging Face directory (tokenizer.json, or vocab.json and merges.txt).

    Raises:
      UserError: no tokenizer there, or one that lacks a token BART needs.
    """

    def __init__(self, directory: str | Path):
        from transformers import BartTokenizer

        self.directory = Path(directory)
        self._tokenizer = _load(BartTokenizer, directory)
        names = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "mask": "<mask>"}
        ids = {k: self._tokenizer.convert_tokens_to_ids(v) for k, v in names.items()}
        missing = [
            names[k] for k, v in ids.items() if v is None or self._tokenizer.convert_ids_to_tokens(v) != names[k]
        ]
        if missing:
            raise UserError(f"{directory}: the tokenizer has no {', '.join(missing)}; point bart at a BART directory")
        self.bos, self.pad, self.eos, self.mask = ids["bos"], ids["pad"], ids["eos"], ids["mask"]
        self.vocab_size = _number_of_ids(self._tokenizer)
        self._backend = _plain_text_backend(self._tokenizer)

    def save(self, directory: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""
        _save(self._tokenizer, directory)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, without `<s>` and `</s>`."""
        return self._backend.encode(_printable(text), add_special_tokens=False).ids

    def wrap(self, ids: list[int]) -> list[int]:
        """`<s>` ids `</s>`."""
        return [self.bos, *ids, self.eos]

    def encode_template(self, template: str, **fields: str) -> list[int]:
        """Ids of a prompt template in which a literal `<mask>` is the mask token and `{name}` is filled as plain text.

        The mask takes the space before it with it, as in BART: "A, <mask> B" is "A,", mask, " B".
        """
        ids: list[int] = []
        for k, part in enumerate(template.split("<mask>")):
            ids += [self.mask] * (k > 0)
            last = k == template.count("<mask>")
            filled = (part if last else part.rstrip(" ")).format(**fields)
            ids += self.encode(filled) if filled else []
        return ids

    def encode_prompt(self, template: str, fields: dict[str, str], cut: str, room: int) -> tuple[list[int], bool]:
        """`encode_template` with the text of the field `cut` cut at its end where more than `room` ids would come of
        it, and whether that was so; "": nothing is cut, as what else is too long."""
        ids = self.encode_template(template, **fields)
        if not cut or len(ids) <= room:
            return ids, False
        head, _, tail = template.partition(f"{{{cut}}}")
        whole = head[len(head.rstrip(" ")) :] + fields[cut]  # a space belongs to the word behind it
        before, after = (self.encode_template(part, **fields) for part in (head.rstrip(" "), tail))
        return before + self.encode(whole)[: max(room - len(before) - len(after), 0)] + after, True

    def decode(self, ids) -> str:
        """Text of the ids; special tokens are dropped."""
        # cleaning up is a directory's choice otherwise, and takes spaces out of the text ("ok ?" would become "ok?")
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return self._tokenizer.decode([int(i) for i in ids], **options).strip()


class ClipText:
    """The teacher's BPE, read from a Hugging Face directory.

    Raises:
      UserError: no tokenizer there.
    """

    def __init__(self, directory: str | Path):
        from transformers import CLIPTokenizer

        self.directory = Path(directory)
        self._tokenizer = _load(CLIPTokenizer, directory)
        self.bos, self.eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        pad = self._tokenizer.pad_token_id
        self.pad = self.eos if pad is None else pad
        self.vocab_size = _number_of_ids(self._tokenizer)
        self._backend = _plain_text_backend(self._tokenizer)

    def save(self, directory: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""
        _save(self._tokenizer, directory)

    def encode(self, text: str) -> list[int]:
        """`<|startoftext|>` text `<|endoftext|>`."""
        return [self.bos, *self._backend.encode(_printable(text), add_special_tokens=False).ids, self.eos]


def _printable(text: str) -> str:
    """The text with "?" for lone surrogates, which JSON can hold and the tokenizers refuse."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _load(kind: type, directory: str | Path):
    directory = Path(directory)
    names = {p.name for p in directory.iterdir()} if directory.is_dir() else set()
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise UserError(f"{directory}: no tokenizer here; it needs tokenizer.json, or vocab.json and merges.txt")
    try:
        return kind.from_pretrained(str(directory), local_files_only=True)
    except Exception as e:  # the tokenizers library raises bare Exception for a file it cannot parse
        raise UserError(f"{directory}: the tokenizer cannot be read ({e}); copy its files again") from e


def _save(tokenizer, directory: Path) -> None:
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    kept = {
        name: value for name, value in values.items() if name not in ("is_local", "local_files_only")
    }  # of this machine
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _number_of_ids(tokenizer) -> int:
    """One more than the largest id; ids that were left out count, so that every id has an embedding row."""
    return 1 + max(tokenizer.get_vocab().values())


def _plain_text_backend(tokenizer):
    """The fast tokenizer beneath, set to read special tokens in a text as plain characters, and the whole text.

    tokenizer.json keeps the truncation and the padding of its last use before it was saved.
    """
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def pad(sequences: list[list[int]], length: int, value: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads lists of ids. Returns int32 [B, length] and its bool mask.

    Raises:
      ValueError: a sequence is longer than `length`.
    """
    ids = np.full((len(sequences), length), value, np.int32)
    mask = np.zeros((len(sequences), length), bool)
    for row, sequence in enumerate(sequences):
        if len(sequence) > length:
            raise ValueError(f"{len(sequence)} tokens do not fit in {length}")
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = True
    return ids, mask


def infill(
    ids: list[int], rng: np.random.Generator, mask_id: int, ratio: float, poisson: float, mask_all: float
) -> list[int]:
    """BART's text infilling (Lewis et al. 2020, section 2.2), per text, without `<s>` and `</s>`.

    Spans with lengths from Poisson(`poisson`) are drawn until they cover `ratio` of the tokens (rounded at random, so
    the mean is exact; the last span is cut to fit); each becomes one mask; a span of length zero inserts one. Spans are
    placed uniformly and never overlap. With probability `mask_all` the whole text becomes one mask.
    """
    if rng.random() < mask_all:
        return [mask_id]
    budget = int(np.floor(len(ids) * ratio + rng.random()))
    lengths: list[int] = []
    while budget > 0:
        lengths.append(min(int(rng.poisson(poisson)), budget))
        budget -= lengths[-1]
    slots = np.zeros(len(ids) - sum(lengths) + len(lengths), bool)
    slots[rng.choice(len(slots), size=len(lengths), replace=False)] = True
    out, position, spans = [], 0, iter(rng.permutation(lengths).tolist())
    for is_span in slots:
        if is_span:
            out.append(mask_id)
            position += next(spans)
        else:
            out.append(ids[position])
            position += 1
    return out
