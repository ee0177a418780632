"""A vLLM of another version: the two methods of its schedulers that are watched have other names, in its whole source."""

import importlib.machinery
import re
import sys

RENAMED = [
    (rb"def schedule\(", b"def plan("),
    (rb"scheduler\.schedule\(", b"scheduler.plan("),
    (rb"super\(\)\.schedule\(", b"super().plan("),
    (
        rb"def update_from_output\(\n        self,\n        scheduler_output",
        b"def take_in(\n        self,\n        scheduler_output",
    ),
    (rb"scheduler\.update_from_output\(", b"scheduler.take_in("),
]


class Renaming(importlib.machinery.SourceFileLoader):
    """Loads a module with the names changed."""

    def get_code(self, fullname):
        source = self.get_data(self.path)
        for before, after in RENAMED:
            source = re.sub(before, after, source)
        return self.source_to_code(source, self.path)


class Finder:
    """Finds vLLM's engine and schedulers before anybody else does."""

    def find_spec(self, name, path=None, target=None):
        if name != "vllm.v1.engine.core" and not name.startswith("vllm.v1.core.sched."):
            return None
        found = importlib.machinery.PathFinder.find_spec(name, path)
        if found is not None and found.origin and found.origin.endswith(".py"):
            found.loader = Renaming(name, found.origin)
        return found


sys.meta_path.insert(0, Finder())
