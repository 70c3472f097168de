"""Backbones with layer attention, one module per toolbox.

The modules are not imported here: each needs its toolbox, which is optional.
:func:`mmela.registry.add_backbones` has the toolboxes' registries import
them on demand.
"""
