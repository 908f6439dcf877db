"""iNaturalist 2017 and 2018: pictures by super-category, and a JSON that says which class each is of.

`train2018.json` and `val2018.json` lie beside the folder of pictures and have `images` (id, file_name) and
`annotations` (image_id, category_id), as COCO writes them. (2019 and later come in class folders.)
"""

import csv
import hashlib
import io
import json
from pathlib import Path

from dinov2.data.cache import Cache
from dinov2.data.sources import Source, open_source
from dinov2.exits import UserError
from dinov2.files import write_text


def find(path: Path, cache: Path | None = None) -> Source:
    """The pictures that the JSON names, labelled by the number of their category.

    Raises:
        UserError: the file is no such JSON, or names pictures that are not there.
    """
    try:
        data = path.read_bytes()
        content = json.loads(data)
        files = {one["id"]: path.parent / one["file_name"] for one in content["images"]}
        rows = [(files[one["image_id"]], one["category_id"]) for one in content["annotations"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no JSON with images and annotations: {error!r}") from None
    if missing := [file for file, _ in rows if not file.is_file()]:
        raise UserError(f"{path} names {len(missing):,} pictures that are not there, {missing[0]} first")
    text = io.StringIO()
    csv.writer(text).writerows([("path", "label"), *((file.resolve(), label) for file, label in rows)])
    digest = hashlib.sha256(text.getvalue().encode()).hexdigest()[:16]
    listed = Cache(cache).folder / "lists" / f"{path.stem}-{digest}.csv"
    write_text(listed, text.getvalue())
    return open_source(f"{path.stem}={listed}", cache=cache)
