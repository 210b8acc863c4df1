"""Files of texts, of JSON and of captions as they stand: what is in them, and what is said of those that are none."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from vlkd_jax.errors import RecordError, UserError


def read_text(path: Path) -> str:
    """A file's text, of a .gz unpacked, without the byte order mark that Windows programs put before it.

    Raises:
      UserError: missing, no gzip file though so called, not UTF-8.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"{path}: not a gzip file that can be read ({e}); correct the file or its name") from e
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); correct the path") from e
    except UnicodeDecodeError as e:
        is_utf16 = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        what = "UTF-16, not UTF-8" if is_utf16 else f"not UTF-8 at byte {e.start}"
        raise UserError(f"{path}: {what}; save it as UTF-8") from e


def read_json(path: str | Path):
    """A JSON file's value.

    Raises:
      UserError: missing, not UTF-8, not JSON.
    """
    path = Path(path) if isinstance(path, str) else path  # a run may lie in an object store
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as e:
        raise UserError(f"{path} line {e.lineno}: not JSON ({e.msg}); correct the file") from e
    except (ValueError, RecursionError) as e:  # a number of thousands of digits, brackets thousands deep
        raise UserError(f"{path}: not JSON that can be read ({e}); correct the file") from e


def image_files(path: Path, data: dict[str, Any]) -> dict[Any, str]:
    """{image id: file name} of a COCO file's `images`.

    Raises:
      UserError: an id that names two files: captions would go to the wrong picture.
      KeyError, TypeError: entries of another form.
    """
    files: dict[Any, str] = {}
    for image in data["images"]:
        name = files.setdefault(image["id"], image["file_name"])
        if name != image["file_name"]:
            raise UserError(
                f"{path}: image id {image['id']} names two files, {name} and {image['file_name']}; where files were "
                "merged, give the images of each ids of their own"
            )
    return files


Pairs = list[tuple[str, Any, Any] | RecordError]
"""(where, image, caption) of each line or entry, as they stand there; in the place of a line that is none, why."""


def coco_pairs(path: Path) -> Pairs:
    """The captions of a COCO file with their pictures. Raises UserError for what is none."""
    data = read_json(path)
    try:
        files = image_files(path, data)
        return [_coco_pair(path, f"annotation {a.get('id', k)}", a, files) for k, a in enumerate(data["annotations"])]
    except KeyError as e:
        raise UserError(f"{path}: field {e} is missing; a COCO captions file has images and annotations") from e
    except (TypeError, AttributeError) as e:
        raise UserError(f"{path}: not a COCO captions file ({e}); it has lists of images and of annotations") from e


def _coco_pair(path: Path, where: str, annotation: dict, files: dict) -> tuple[str, Any, Any] | RecordError:
    for field in ("image_id", "caption"):
        if field not in annotation:
            return RecordError("malformed entry", f"{path} {where}: field '{field}' is missing; correct the entry")
    if annotation["image_id"] not in files:
        message = f"{path} {where}: its image_id is not among images; correct the entry"
        return RecordError("malformed entry", message)
    return where, files[annotation["image_id"]], annotation["caption"]


def jsonl_pairs(path: Path) -> Pairs:
    """Of a file with an object a line. Raises UserError as `read_text`."""
    pairs: Pairs = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pairs.append((f"line {number}", row["image"], row["caption"]))
            continue
        except (ValueError, RecursionError) as e:
            why = f"not JSON ({getattr(e, 'msg', e)}); correct the line"
        except KeyError as e:
            why = f"field {e} is missing; a line has image and caption"
        except TypeError:
            why = 'not an object; a line is {"image": ..., "caption": ...}'
        pairs.append(RecordError("malformed entry", f"{path} line {number}: {why}"))
    return pairs


def tsv_pairs(path: Path) -> Pairs:
    """Of a file with image<TAB>caption a line. Raises UserError as `read_text`."""
    pairs: Pairs = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        row = line.rstrip("\r").split("\t")
        if line.strip() and len(row) != 2:
            message = f"{path} line {number}: {len(row)} fields, not 2; a line is image<TAB>caption"
            pairs.append(RecordError("malformed entry", message))
        elif line.strip():
            pairs.append((f"line {number}", row[0], row[1]))
    return pairs
