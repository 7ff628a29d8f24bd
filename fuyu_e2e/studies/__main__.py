"""`python -m fuyu_e2e.studies NAME [options]`: every study prints a table and writes its figures as JSON."""

import sys

from fuyu_e2e.bench.command import run

STUDIES = {
    "grid": "fuyu_e2e.studies.grid:grid",
    "isoflop": "fuyu_e2e.studies.isoflop:isoflop",
    "optimizers": "fuyu_e2e.studies.optimizers:optimizers",
    "ocr": "fuyu_e2e.studies.ocr:ocr",
    "resolution": "fuyu_e2e.studies.resolution:resolution",
    "sort-of-clevr": "fuyu_e2e.studies.sort_of_clevr:sort_of_clevr",
    "stamps": "fuyu_e2e.studies.stamps:stamps",
}


def main() -> int:
    """Runs the named study."""
    return run("fuyu_e2e.studies", "study", STUDIES)


if __name__ == "__main__":
    sys.exit(main())
