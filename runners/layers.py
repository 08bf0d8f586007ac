"""The config's choice of layers as the library takes it."""

from omegaconf import DictConfig

from ghost import Selection


def layer_selection(layers: DictConfig) -> Selection:
    """The config's `layers` node as a selection."""
    return Selection(
        include=tuple(layers.include),
        exclude=tuple(layers.exclude),
        families=tuple(str(family) for family in layers.families),
        blocks=tuple(layers.blocks),
    )
