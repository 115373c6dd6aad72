import itertools

import pytest
import torch
from matplotlib.figure import Figure

from wisecli.artifacts.masks import random_mask
from wisecli.bench.studies.shards import Shards, overlap_curve
from wisecli.models.layout.site import MatrixSite


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_masks_of_the_curves_ratio_overlap_in_three_percent(count: int) -> None:
    site = MatrixSite("llama", 0, "", "", False, 500, 400)
    generator = torch.Generator().manual_seed(0)
    ratio = overlap_curve([count])[0]
    shared = torch.ones(site.d * site.d_ff)
    for _ in range(count):
        mask = random_mask(site, ratio, "elements", generator)
        shared *= torch.zeros_like(shared).index_fill(0, mask.indices, 1)
    assert float(shared.mean()) == pytest.approx(0.03, abs=0.002)


def test_the_curve_lies_where_it_belongs_among_the_cells() -> None:
    grid = list(itertools.product((0.1, 0.3, 0.8), (1, 2, 5)))
    rows = [
        {"edits": 9, "mask_ratio": ratio, "shards": count, "figures": {"mean": ratio * count / 4}}
        for ratio, count in grid
    ]
    figure = Figure()
    Shards().draw(figure, rows)
    panel = figure.axes[0]
    (line,) = panel.get_lines()
    across, up = line.get_data()
    assert min(across) < 1
    assert max(across) > 5
    assert [ratio**count for count, ratio in zip(across, up, strict=True)] == pytest.approx([0.03] * len(up))
    # The cell that lies around each place of the grid has its mean.
    mesh = panel.collections[0]
    borders = mesh.get_coordinates()
    for ratio, count in grid:
        column = int((borders[0, :, 0] < count).sum()) - 1
        row = int((borders[:, 0, 1] < ratio).sum()) - 1
        assert mesh.get_array()[row, column] == pytest.approx(ratio * count / 4)
