"""Pictures with classes, however they are named: a source, an iNaturalist JSON, a set of torchvision's."""

from pathlib import Path

from dinov2.data.sources import Source, open_source
from evals.layouts import inaturalist, torchvision_sets


def open_labelled(spec: str, cache: Path | None = None) -> Source:
    """Raises UserError: see `open_source`, and the two layouts."""
    if spec.startswith(torchvision_sets.PREFIX):
        return torchvision_sets.find(spec, cache)
    if spec.endswith(".json"):
        return inaturalist.find(Path(spec).expanduser(), cache)
    return open_source(spec, cache=cache)
