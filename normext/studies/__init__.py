"""The experiments behind ``normext study``: what normalization does for training, on real images.

Each study is a module of its own: its trainings, its plots and its report. A new one is a subclass of `Study` in a
module of its own and a line in `STUDIES`.
"""

from normext.studies.batch_size import BatchSize
from normext.studies.convnet import ConvNet
from normext.studies.deep import Deep
from normext.studies.layer_width import LayerWidth
from normext.studies.study import Study
from normext.studies.weight_scale import WeightScale

__all__ = ["STUDIES", "Study"]

# By the name of their command.
STUDIES: dict[str, tuple[Study, ...]] = {
    "deep": (Deep(),),
    "weight-scale": (WeightScale(),),
    "batch-size": (BatchSize("batch"), BatchSize("layer")),
    "layer-width": (LayerWidth(),),
    "convnet": (ConvNet(),),
}
