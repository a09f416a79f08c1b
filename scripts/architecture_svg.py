"""Drawing of docs/images/architecture.svg, the picture of the system: python scripts/architecture_svg.py.

Text is at least 17 units high where the picture is 600 wide, so that it is 10 pixels high on a phone of 390. The
picture brings its own background, for a page may be light where the reader's system is dark.
"""

from html import escape
from itertools import pairwise
from pathlib import Path

PICTURE = Path(__file__).parents[1] / "docs/images/architecture.svg"
WIDTH, HEIGHT = 600, 780

STYLE = """
    svg { --back: #ffffff; --ink: #1f2328; --soft: #59636e; --line: #6e7781; --driver: #eef1f4;
          --rollout: #ddebfd; --teacher: #fdeccb; --learner: #d8f3dc; --sync: #eadffc; --edge: #8c959f; }
    @media (prefers-color-scheme: dark) {
      svg { --back: #14181d; --ink: #f0f3f6; --soft: #a9b4c0; --line: #9aa5b1; --driver: #232a32;
            --rollout: #16365f; --teacher: #57400f; --learner: #17472a; --sync: #41296b; --edge: #6e7781; }
    }
    text { font: 17px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--ink); }
    .name { font-weight: 700; font-size: 18px; }
    .room { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: var(--soft); }
    .soft { fill: var(--soft); }
    .mid { text-anchor: middle; }
    rect { stroke: var(--edge); stroke-width: 1.5; }
    .back { fill: var(--back); stroke: none; }
    .driver { fill: var(--driver); } .step { fill: var(--back); }
    .rollout { fill: var(--rollout); } .teacher { fill: var(--teacher); }
    .learner { fill: var(--learner); } .sync { fill: var(--sync); stroke-dasharray: 6 4; }
    path { fill: none; stroke: var(--line); stroke-width: 2; }
    .tip { fill: var(--line); stroke: none; }
"""
DESCRIPTION = (
    "The driver's loop is collect, score, weigh, pack, learn, publish, and the next step. "
    "Collect sends prompts and how to sample to the rollout actors (vLLM) and gets token ids, log-probabilities and "
    "versions. "
    "Score sends prompts and completions to the teacher actors and gets log-probabilities, or handles of hidden "
    "states, which themselves go through the object store to the learner ranks. "
    "Learn sends micro-batches and the objective to the learner ranks (DeepSpeed) and gets loss and metrics. "
    "Publish has the learner ranks lay out new weights in chunks with digests, which weight sync brings to the rollout "
    "actors; acknowledgements come back."
)

# The driver's steps: name and the height of its middle.
STEPS = {"collect": 138, "score": 276, "weigh": 374, "pack": 438, "learn": 534, "publish": 674}
# The boxes beside them: color, name, what it is, its folder, from where to where.
BOXES = (
    ("rollout", "Rollout actors", ["vLLM writes text"], "actors/", 86, 190),
    ("teacher", "Teacher actors", ["one pool per teacher,", "own model or HTTP"], "teacher_service/", 214, 338),
    ("learner", "Learner ranks", ["DeepSpeed trains"], "learner/", 482, 586),
    ("sync", "Weight sync", ["shared memory, NCCL,", "CUDA IPC or Ray's", "object store"], "weight_sync/", 622, 768),
)
# What goes to a box, and what comes back.
EXCHANGES = {
    "collect": (["prompts, sampling"], ["token ids, versions,", "logprobs"]),
    "score": (["prompt, completion"], ["logprobs, or handles", "of hidden states"]),
    "learn": (["micro-batches,", "objective"], ["loss, metrics"]),
    "publish": (["version, digests,", "handles of chunks"], ["ack: digest,", "sentinel gap"]),
}
DRIVER_RIGHT, BOX_LEFT, BOX_RIGHT, LANE = 142, 344, 566, 578


def text(x: float, y: float, words: str, style: str = "") -> str:
    """One line."""
    return f'<text x="{x:g}" y="{y:g}"' + (f' class="{style}"' if style else "") + f">{escape(words)}</text>"


def rect(style: str, left: float, top: float, right: float, bottom: float) -> str:
    """A box with round corners."""
    return f'<rect class="{style}" x="{left:g}" y="{top:g}" width="{right - left:g}" height="{bottom - top:g}" rx="8"/>'


def arrow(*points: tuple[float, float]) -> str:
    """A line along the points with a tip at its end."""
    (x0, y0), (x, y) = points[-2:]
    dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
    back, half = 10, 5
    corners = [
        (x, y),
        (x - back * dx - half * dy, y - back * dy - half * dx),
        (x - back * dx + half * dy, y - back * dy + half * dx),
    ]
    line = [*points[:-1], (x - back * dx, y - back * dy)]
    drawn = "M" + " L".join(f"{a:g} {b:g}" for a, b in line)
    tip = "M" + " L".join(f"{a:g} {b:g}" for a, b in corners) + " Z"
    return f'<path d="{drawn}"/><path class="tip" d="{tip}"/>'


def driver() -> list[str]:
    """The loop: its steps from top to bottom, and back."""
    parts = [
        rect("driver", 8, 12, DRIVER_RIGHT, HEIGHT - 12),
        text(75, 40, "Driver", "name mid"),
        text(75, 64, "opd/loop/", "room mid"),
    ]
    heights = list(STEPS.values())
    for name, y in STEPS.items():
        parts += [rect("step", 36, y - 20, 134, y + 20), text(85, y + 6, name, "name mid")]
    parts += [arrow((85, a + 20), (85, b - 20)) for a, b in pairwise(heights)]
    parts.append(arrow((36, heights[-1]), (22, heights[-1]), (22, heights[0]), (36, heights[0])))
    parts.append(text(80, 720, "next step", "soft mid"))
    return parts


def boxes() -> list[str]:
    """The boxes that the driver calls."""
    middle = (BOX_LEFT + BOX_RIGHT) / 2
    parts = [text(middle, 40, "Ray actors", "name mid"), text(middle, 64, "launch/services/", "room mid")]
    for style, name, lines, room, top, bottom in BOXES:
        parts += [rect(style, BOX_LEFT, top, BOX_RIGHT, bottom), text(middle, top + 28, name, "name mid")]
        parts += [text(middle, top + 54 + 22 * i, line, "mid") for i, line in enumerate(lines)]
        parts.append(text(middle, bottom - 16, room, "room mid"))
    return parts


def exchanges() -> list[str]:
    """Data exchanged: between a step and its box, from teachers to learners, from learners to engines."""
    left, right = DRIVER_RIGHT + 4, BOX_LEFT - 4
    parts = []
    for step, (sent, answered) in EXCHANGES.items():
        y = STEPS[step]
        parts += [arrow((134, y - 6), (right, y - 6)), arrow((right, y + 8), (134, y + 8))]
        top = y - 6 - 10 - 21 * (len(sent) - 1)
        middle = (left + right) / 2
        parts += [text(middle, top + 21 * i, line, "mid") for i, line in enumerate(sent)]
        parts += [text(middle, y + 30 + 21 * i, line, "mid") for i, line in enumerate(answered)]
    (_, _, _, _, rollout, _), (*_, teacher), (_, _, _, _, learner, learned), (_, _, _, _, sync, synced) = BOXES
    middle = (BOX_LEFT + BOX_RIGHT) / 2
    parts += [
        arrow((BOX_LEFT + 24, teacher), (BOX_LEFT + 24, learner)),
        text(BOX_LEFT + 40, 394, "hidden states,"),
        text(BOX_LEFT + 40, 416, "through Ray's"),
        text(BOX_LEFT + 40, 438, "object store"),
        arrow((BOX_LEFT + 24, learned), (BOX_LEFT + 24, sync)),
        text(BOX_LEFT + 40, (learned + sync) / 2 + 6, "chunks, digests"),
    ]
    live = (rollout + 52, (sync + synced) / 2)
    parts.append(arrow((BOX_RIGHT, live[1]), (LANE, live[1]), (LANE, live[0]), (BOX_RIGHT, live[0])))
    parts.append(f'<g transform="translate(595 410) rotate(-90)">{text(0, 0, "new weights", "mid")}</g>')
    return parts


def picture() -> str:
    """The whole file."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" aria-labelledby="title description">',
        '  <title id="title">The parts of opd and what travels between them</title>',
        f'  <desc id="description">{escape(DESCRIPTION)}</desc>',
        f"  <style>{STYLE}  </style>",
        f'  <rect class="back" width="{WIDTH}" height="{HEIGHT}" rx="12"/>',
        *(f"  {part}" for part in (*driver(), *boxes(), *exchanges())),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture())
