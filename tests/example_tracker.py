"""The tracker of docs/new_tracker.md: `metrics.csv`, with a line for each step and metric."""

import csv


class CSV:
    def __init__(self, workdir, resume_step):
        path = workdir / "metrics.csv"
        kept = []
        # A resumed run keeps its lines up to the restored step. It has none if it had no tracker before.
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
