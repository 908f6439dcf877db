"""One look for every report: a self-contained HTML page of numbers, tables, charts and galleries.

page = Page("Curation", subtitle="messy_pool")
page.numbers({"kept": 1234, "dropped": 56})
page.figure(curve({"loss": (steps, losses)}, x="step", y="loss"), "Training loss.")
page.write(output / "report.html")
"""

from dinov2.pages.charts import chart, curve, histogram
from dinov2.pages.page import Card, Page

__all__ = ["Card", "Page", "chart", "curve", "histogram"]
