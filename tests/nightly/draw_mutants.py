"""Leave so many mutants of a cosmic-ray session, drawn by a seed, and skip the others: a night has only so many hours.

python tests/nightly/draw_mutants.py SESSION.sqlite NUMBER SEED
"""

from __future__ import annotations

import random
import sys

from cosmic_ray.work_db import WorkDB
from cosmic_ray.work_item import WorkerOutcome, WorkResult


def main() -> None:
    """Skip what is not drawn, and say how many are left of how many."""
    session, number, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    database = WorkDB(session, WorkDB.Mode.open)
    # By place and operator, which a new session has in common with an old one; its job ids are its own.
    pending = sorted(database.pending_work_items, key=lambda item: str(item.mutations))
    left = random.Random(seed).sample(pending, min(number, len(pending)))
    for item in pending:
        if item not in left:
            database.set_result(item.job_id, WorkResult(output="not drawn", worker_outcome=WorkerOutcome.SKIPPED))
    print(f"{len(left)} of {len(pending)} mutants are drawn by seed {seed}")
    database.close()


if __name__ == "__main__":
    main()
