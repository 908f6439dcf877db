"""Stage 10: `report.html`, what was chosen and why, for a person to look at and disagree with.

The page samples: some of each kind of decision, large enough to be judged. All others are in pages beside
it, in `report/`, as thumbnails. Nothing needs a server, or the network.
"""

from curation.report.page import run

__all__ = ["run"]
