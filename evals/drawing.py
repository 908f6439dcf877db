"""What several tasks put on a result's page: confusions, and pictures beside what they were taken for."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from dinov2.data.decode import Unreadable, decode
from dinov2.neighbours import nearest
from dinov2.pages import Card, Page
from dinov2.pages.charts import chart
from evals.data import Labelled, Parts

SHOWN = 12  # pictures of each kind
NEIGHBOURS = 3  # beside each
MOST_CLASSES = 40  # whose confusions can be told apart in one chart
THUMBNAIL = 128


def draw_classification(
    page: Page, parts: Parts, ids: Sequence[str], truth: Int[Tensor, "n"], answer: Int[Tensor, "n"]
) -> None:
    """Accuracy of each class and the most frequent confusions."""
    classes = len(parts.classes)
    counts = torch.bincount(truth * classes + answer, minlength=classes**2).view(classes, classes)
    page.heading("Confusions")
    if classes <= MOST_CLASSES:
        caption = "Rows: the class; columns: what its test pictures were taken for, as a share of the row."
        page.figure(confusion_chart(counts, parts.classes), caption)
    wrong = counts.clone().fill_diagonal_(0).flatten()
    most = wrong.argsort(descending=True, stable=True)[:10]
    rows = [
        [parts.classes[int(pair) // classes], parts.classes[int(pair) % classes], int(wrong[pair])]
        for pair in most
        if wrong[pair]
    ]
    if rows:
        page.table(["class", "taken for", "pictures"], rows, caption="The most frequent confusions")


def draw_neighbours(
    page: Page,
    parts: Parts,
    train: tuple[Sequence[str], Float[Tensor, "m dim"]],
    test: tuple[Sequence[str], Float[Tensor, "n dim"]],
    truth: Int[Tensor, "n"],
    answer: Int[Tensor, "n"],
) -> None:
    """Some test pictures, rightly and wrongly recognised, each beside its nearest training pictures."""
    page.heading("Nearest neighbours")
    base = normalize(train[1].float(), dim=1)
    for right in (True, False):
        rows = _spread((truth == answer if right else truth != answer).nonzero()[:, 0])
        _, index = nearest(normalize(test[1][rows].float(), dim=1), base, NEIGHBOURS)
        cards = []
        for row, neighbours in zip(map(int, rows), index, strict=True):
            shown = [picture_of(parts.test, test[0][row])]
            shown += [picture_of(parts.train, train[0][int(neighbour)]) for neighbour in neighbours]
            cards.append(_card(shown, parts.classes, int(truth[row]), int(answer[row])))
        caption = f"{_kind(right)}: a test picture, then its nearest training pictures"
        _gallery(page, cards, caption, columns=2, side=104)


def draw_examples(
    page: Page, parts: Parts, ids: Sequence[str], truth: Int[Tensor, "n"], answer: Int[Tensor, "n"]
) -> None:
    """Some test pictures, rightly and wrongly recognised."""
    page.heading("Examples")
    for right in (False, True):
        rows = _spread((truth == answer if right else truth != answer).nonzero()[:, 0])
        cards = [
            _card([picture_of(parts.test, ids[row])], parts.classes, int(truth[row]), int(answer[row]))
            for row in map(int, rows)
        ]
        _gallery(page, cards, _kind(right))


def confusion_chart(counts: Int[Tensor, "classes classes"], names: Sequence[str]) -> Figure:
    side = 2.2 + 0.22 * len(names)
    axes = chart(width=min(9.4, 1.6 + side), height=side)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.grid(visible=False)
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return figure


def _spread(rows: Int[Tensor, "n"]) -> Int[Tensor, "kept"]:
    """A few of these rows, evenly spread: sources lie sorted by class."""
    kept = min(SHOWN, len(rows))
    return rows[(torch.arange(kept) * len(rows)) // max(kept, 1)]


def picture_of(part: Labelled, id_: str) -> Image.Image:
    """A picture of a part, perhaps at a reduced scale."""
    try:
        return decode(part.source.read(part.row_of[id_]), at_least=THUMBNAIL)
    except Unreadable:  # it could be read before; a page is not worth failing for
        return Image.new("RGB", (THUMBNAIL, THUMBNAIL), "grey")


def _card(pictures: list[Image.Image], classes: Sequence[str], truth: int, answer: int) -> Card:
    right = truth == answer
    text = classes[truth] if right else f"{classes[truth]}, taken for {classes[answer]}"
    return Card(pictures=pictures, text=text, tone="good" if right else "bad")


def _gallery(
    page: Page, cards: list[Card], caption: str, columns: int | None = None, side: int = THUMBNAIL
) -> None:
    if cards:
        page.gallery(cards, caption, columns, side)


def _kind(right: bool) -> str:
    return "Recognised" if right else "Not recognised"
