"""Writing WebDataset shards: tars whose bytes depend on nothing but the samples."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from dinov2.data.tars import members
from dinov2.files import write_whole

OWNER = "root"  # with user and group number 0 and time 0: nothing of the machine gets into the shard


@dataclass(frozen=True)
class ShardSample:
    """One picture on its way into a shard.

    Attributes:
        id: the picture's id, which becomes the key.
        extension: of the picture's file, with or without its dot; lower-cased.
        data: the picture's bytes, which go in as they are.
        facts: entries of the .json.
        label: text; goes into the .json too, which is where our reader looks first.
        class_index: goes into the .cls instead of the label: webdataset's `decode()` wants a number there.
    """

    id: str
    extension: str
    data: bytes
    facts: Mapping[str, Any] = field(default_factory=dict)
    label: str | None = None
    class_index: int | None = None


def write_shard(path: Path | str, samples: Iterable[ShardSample]) -> list[tuple[int, int]]:
    """Write one shard, whole: for each sample `<id>.<ext>`, `<id>.json` and, if labelled, `<id>.cls`.

    Returns:
        Offset and size in bytes of each picture's payload, in the order of the samples, as read back.
    """
    from webdataset.writer import TarWriter  # takes more than a second to import

    names = []
    with write_whole(path, "w+b") as file:
        stream = cast(BinaryIO, file)
        with TarWriter(stream, encoder=False, user=OWNER, group=OWNER, mode=0o644, mtime=0) as tar:
            for sample in samples:
                extension = sample.extension.lstrip(".").lower()
                names.append(f"{sample.id}.{extension}")
                tar.write({"__key__": sample.id, extension: sample.data, **_companions(sample)})
        file.flush()
        places = {name: (offset, size) for name, offset, size in members(file.fileno(), file.tell())}
    return [places[name] for name in names]


def _companions(sample: ShardSample) -> dict[str, bytes]:
    label = {} if sample.label is None else {"label": sample.label}
    text = json.dumps({**sample.facts, **label}, sort_keys=True, ensure_ascii=False)
    index = sample.label if sample.class_index is None else str(sample.class_index)
    return {"json": text.encode(), **({} if index is None else {"cls": index.encode()})}
