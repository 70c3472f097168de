"""Backbones with layer attention, one module per toolbox.

They are not imported here, because each needs its toolbox, which is optional.
:func:`mmela.registry.register_backbones` lets the toolboxes' registries import them
on demand.
"""
