"""Draws docs/method.png, one step of the method: `python docs/figures/method.py`.

Scores and gradients are made up; advantages, the Gram matrix and alpha are computed from them as the method does.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from balancers import min_norm_weights

REWARDS = ("PickScore", "HPSv2", "CLIPScore", "OCR", "GenEval")
COLOURS = ("#4C72B0", "#55A868", "#8172B3", "#DD8452", "#C44E52")
INK, GREY, REFRESH, CHEAP = "#222222", "#8A8A8A", "#FBF1E6", "#EDF3EA"
READ = ("0K", "OX", "OK", "QK", "OK", "CK")
IMAGES, WIDTH, HEIGHT = len(READ), 13.2, 6.0
TOP, MIDDLE = 3.55, 4.25
"""Where matrices begin, and the height of the arrows between them."""


def made_up() -> tuple[np.ndarray, np.ndarray]:
    """Scores (image, reward) of one prompt with quoted text, to which GenEval does not apply; and unit gradients."""
    draws = np.random.default_rng(4)
    quality = draws.normal(size=(IMAGES, 1))
    scores = 0.8 * quality + draws.normal(size=(IMAGES, len(REWARDS)))
    scores[:, -1] = np.nan
    gradients = draws.normal(size=(len(REWARDS), 24)) + 0.45 * draws.normal(size=(1, 24))
    gradients[3] -= 0.8 * gradients[0]
    return scores, gradients / np.linalg.norm(gradients, axis=1, keepdims=True)


def matrix(axes: Axes, values: np.ndarray, colours: str, size: float) -> None:
    """A matrix as squares; what is missing is hatched."""
    axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=-size, vmax=size, aspect="auto")
    for row, column in np.argwhere(np.isnan(values)):
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="white", edgecolor=GREY, hatch="////", lw=0))
    rows, columns = values.shape
    axes.hlines(np.arange(rows - 1) + 0.5, -0.5, columns - 0.5, color="white", linewidth=1.5)
    axes.vlines(np.arange(columns - 1) + 0.5, -0.5, rows - 0.5, color="white", linewidth=1.5)


def dots(axes: Axes, where: str) -> None:
    """The rewards' colours at the columns, and for a Gram matrix at the rows too."""
    for index, colour in enumerate(COLOURS):
        axes.plot(index, 1.045, "o", color=colour, ms=5, transform=axes.get_xaxis_transform(), clip_on=False)
        if where == "both":
            axes.plot(-0.045, index, "o", color=colour, ms=5, transform=axes.get_yaxis_transform(), clip_on=False)


class Canvas:
    """The figure, with texts, arrows and boxes at places in inches."""

    def __init__(self) -> None:
        self.figure = plt.figure(figsize=(WIDTH, HEIGHT), dpi=100)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
        self.axes.axis("off")

    def text(self, x: float, y: float, words: str, **options: Any) -> None:
        self.axes.text(x, y, words, **{"ha": "center", "va": "center", "color": INK, "zorder": 5, **options})

    def arrow(self, *points: tuple[float, float], colour: str = INK) -> None:
        for begin, end in pairwise(points[:-1]):
            self.axes.plot(*zip(begin, end, strict=True), color=colour, lw=1.5, solid_capstyle="round")
        style = {"arrowstyle": "-|>", "mutation_scale": 13, "lw": 1.5, "shrinkA": 0, "shrinkB": 0, "color": colour}
        self.axes.add_patch(FancyArrowPatch(points[-2], points[-1], **style))

    def box(self, x: float, y: float, width: float, height: float, colour: str, edge: str = GREY) -> None:
        style = "round,pad=0,rounding_size=0.12"
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, fc=colour, ec=edge, lw=0.9, zorder=0))

    def place(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes without ticks."""
        axes = self.figure.add_axes((x / WIDTH, y / HEIGHT, width / WIDTH, height / HEIGHT))
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=GREY, linewidth=0.7)
        return axes


def draw_images(canvas: Canvas) -> None:
    """A prompt and its images."""
    canvas.box(0.15, 3.9, 1.5, 0.7, "white")
    canvas.text(0.9, 4.25, 'a sign that\nsays "OK"', style="italic", fontsize=9.5)
    canvas.text(0.9, 5.35, "prompt", weight="bold")
    for row in range(IMAGES):
        sheet = canvas.place(2.25, TOP + (IMAGES - 1 - row) * 0.235, 0.55, 0.215)
        sheet.imshow(np.full((2, 2), 0.25 + 0.1 * np.sin(3 * row)), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        sheet.text(0.5, 0.5, READ[row], transform=sheet.transAxes, ha="center", va="center", fontsize=8)
    canvas.text(2.52, 5.35, "images", weight="bold")


def draw_coefficients(canvas: Canvas, scores: np.ndarray) -> None:
    """From scores to advantages to loss coefficients."""
    advantages = (scores - scores.mean(0)) / (scores.std(0) + 1e-4)
    good = np.clip(0.5 + advantages / 4, 0, 1)
    columns = {"scores": (scores, "PuOr_r", 3.4, 2.4), "advantages": (advantages, "RdYlGn", 5.55, 2.2)}
    for title, (values, colours, x, size) in columns.items():
        axes = canvas.place(x, TOP, 1.35, 1.4)
        matrix(axes, values, colours, size)
        dots(axes, "columns")
        canvas.text(x + 0.67, 5.35, f"K {title}", weight="bold")
    for index, (sign, share) in enumerate((("+", good), ("−", 1 - good))):
        axes = canvas.place(7.7 + index * 1.12, TOP, 1.0, 1.4)
        matrix(axes, 2 * share - 1, "Greens" if sign == "+" else "Reds", 1)
        dots(axes, "columns")
        canvas.text(8.2 + index * 1.12, TOP - 0.2, f"$c^{{{sign.replace('−', '-')}}}$", fontsize=12)
    canvas.text(8.76, 5.35, "loss coefficients", weight="bold")
    for begin, end in ((1.68, 2.2), (2.83, 3.35), (4.78, 5.5), (6.93, 7.65)):
        canvas.arrow((begin, MIDDLE), (end, MIDDLE))
    canvas.text(5.14, MIDDLE + 0.42, "per\nprompt", fontsize=8, color=GREY)
    canvas.text(7.29, MIDDLE + 0.25, "clamp", fontsize=8, color=GREY)


def draw_update(canvas: Canvas) -> None:
    """The update of every step."""
    canvas.box(11.0, 3.55, 2.0, 1.4, CHEAP)
    canvas.text(12.0, 5.35, "update", weight="bold")
    canvas.text(12.0, 4.55, r"$d = \sum_k \alpha_k\, g_k$", fontsize=13)
    canvas.text(12.0, 4.1, "+ KL, not balanced", fontsize=8.5, color=GREY)
    canvas.text(12.0, 3.78, "of the trained LoRA", fontsize=8.5, color=GREY)
    canvas.arrow((9.85, MIDDLE), (10.97, MIDDLE))
    canvas.text(10.4, MIDDLE + 0.43, "1 backward\npass", fontsize=8.5)
    canvas.text(10.4, MIDDLE - 0.3, "every step", fontsize=8.5, color=GREY)


def draw_refresh(canvas: Canvas, gradients: np.ndarray) -> None:
    """A refresh: gradients, their Gram matrix, the quadratic program, alpha."""
    gram = gradients @ gradients.T
    alpha = min_norm_weights(torch.from_numpy(gram)).numpy()
    canvas.box(3.2, 0.42, 9.8, 2.5, REFRESH)
    canvas.text(3.4, 2.7, "refresh: every N steps", weight="bold", ha="left")
    canvas.arrow((8.76, TOP - 0.32), (8.76, 3.05), (8.76, 2.95))
    axes = canvas.place(3.55, 0.85, 2.6, 1.3)
    matrix(axes, gradients, "PuOr_r", 0.5)
    for index, colour in enumerate(COLOURS):
        axes.plot(-0.03, index, "o", color=colour, ms=5, transform=axes.get_yaxis_transform(), clip_on=False)
    canvas.text(4.85, 2.35, "K gradients, 2 backward passes", fontsize=9.5)
    canvas.text(4.85, 0.65, r"$\hat g_k = g_k / \|g_k\|$", fontsize=10)
    axes = canvas.place(7.15, 0.85, 1.3, 1.3)
    matrix(axes, gram, "RdBu_r", 1)
    dots(axes, "both")
    canvas.text(7.8, 2.38, "Gram matrix", fontsize=9.5)
    canvas.text(7.8, 0.65, r"$\langle \hat g_j, \hat g_k \rangle$", fontsize=10)
    canvas.box(9.1, 1.1, 1.35, 0.8, "white")
    canvas.text(9.78, 1.5, "quadratic\nprogram", fontsize=9.5)
    canvas.text(9.78, 0.78, r"$\min_\alpha \|\sum_k \alpha_k \hat g_k\|^2$", fontsize=9.5)
    axes = canvas.place(11.15, 0.85, 1.5, 1.3)
    axes.bar(range(len(REWARDS)), alpha, color=COLOURS, width=0.75)
    axes.set(ylim=(0, max(alpha) * 1.15), facecolor="none")
    axes.spines[["top", "right", "left"]].set_visible(False)
    canvas.text(11.9, 2.38, r"$\alpha$, smoothed", fontsize=9.5)
    for begin, end in ((6.25, 6.95), (8.52, 9.05), (10.5, 11.05)):
        canvas.arrow((begin, 1.5), (end, 1.5))
    canvas.arrow((12.0, 2.95), (12.0, 3.0), (12.0, 3.5))


def draw_legend(canvas: Canvas) -> None:
    """The rewards' colours, and the arrow from the update back to the images."""
    for index, (name, colour) in enumerate(zip(REWARDS, COLOURS, strict=True)):
        canvas.axes.plot(0.35, 2.3 - 0.3 * index, "o", color=colour, ms=6)
        canvas.text(0.55, 2.3 - 0.3 * index, name, ha="left", fontsize=9.5)
    canvas.axes.add_patch(Rectangle((0.27, 0.72), 0.17, 0.17, facecolor="white", edgecolor=GREY, hatch="////", lw=0.5))
    canvas.text(0.55, 0.8, "does not apply (NaN)", ha="left", fontsize=9.5)
    canvas.text(0.25, 2.68, "K rewards", ha="left", weight="bold")
    canvas.arrow((12.0, 5.55), (12.0, 5.75), (2.52, 5.75), (2.52, 5.52), colour=GREY)
    words = " the old LoRA, which samples, follows the trained one "
    canvas.text(7.2, 5.75, words, fontsize=8.5, color=GREY, backgroundcolor="white")


def draw() -> Any:
    """The figure."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "hatch.color": "#C8C8C8", "hatch.linewidth": 0.8})
    canvas = Canvas()
    scores, gradients = made_up()
    draw_images(canvas)
    draw_coefficients(canvas, scores)
    draw_update(canvas)
    draw_refresh(canvas, gradients)
    draw_legend(canvas)
    return canvas.figure


if __name__ == "__main__":
    target = Path(__file__).parents[1] / "method.png"
    draw().savefig(target, metadata={"Software": None})
    print(f"{target}, {target.stat().st_size // 1000} kB")
