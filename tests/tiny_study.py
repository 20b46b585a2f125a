"""A study that takes milliseconds."""

from dataclasses import replace

from normext.studies import Study
from normext.studies.training import Training

TINY = Training(
    "tiny", "points", (6,), "batchnorm", weight_scale=0.1, batch_size=5, learning_rate=1e-2, epochs=2, seed=3
)


class TinyStudy(Study):
    """Three trainings of a few milliseconds."""

    name = "tiny"
    title = "Tiny"
    description = "Tiny."

    def trainings(self, data, seed, quick):
        return [
            replace(TINY, name=norm or "none", data=data, normalization=norm, seed=seed)
            for norm in (None, "batchnorm", "layernorm")
        ]

    def figures(self, results):
        return {}

    def report(self, results):
        return "\n".join(training.name for training, _ in results)
