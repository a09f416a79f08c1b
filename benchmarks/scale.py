"""Scale in virtual time and on the processor's clock: schedules (P6), the loop's own cost (P10), clusters (P12).

python benchmarks/scale.py overlap  [devices] [steps] [steps at either end that are not measured]
python benchmarks/scale.py loop     [samples] [ray]
python benchmarks/scale.py cluster  [devices ...] [steps=60]
"""

import sys

from benchmarks.cluster import cluster
from benchmarks.loop_cost import loop_cost
from benchmarks.schedule import overlap


def main() -> None:
    """Run one of the three parts."""
    if len(sys.argv) < 2 or sys.argv[1] not in ("overlap", "loop", "cluster"):
        sys.exit(__doc__)
    part, rest = sys.argv[1], [int(a) for a in sys.argv[2:] if a.isdigit()]
    if part == "overlap":
        overlap(*rest)
    elif part == "loop":
        loop_cost(*rest, with_ray="ray" in sys.argv)
    else:
        steps = next((int(a[6:]) for a in sys.argv[2:] if a.startswith("steps=")), 60)
        cluster(rest or (64, 512, 4096), steps)


if __name__ == "__main__":
    main()
