"""A tracker of one's own, as docs/new_tracker.md writes it: `metrics.csv`, a line for each step and metric."""

import csv


class CSV:
    def __init__(self, workdir, resume_step):
        path = workdir / "metrics.csv"
        kept = []
        # A resumed run keeps its lines, but those of later steps are no longer true. It may have had no tracker before.
        if resume_step != -1 and path.exists():
            with path.open(newline="") as file:
                kept = [row for row in csv.reader(file) if resume_step is None or int(row[0]) <= resume_step]
        self.file = path.open("w", newline="")
        self.writer = csv.writer(self.file)
        self.writer.writerows(kept)

    def write(self, step, values):
        self.writer.writerows([step, name, value] for name, value in sorted(values.items()))
        self.file.flush()

    def close(self):
        self.file.close()
