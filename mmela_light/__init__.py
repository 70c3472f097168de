"""Code that must run without torch: the command line, and a finder that torch calls.

``import mmela`` is slow, because it imports torch and mmengine to register backbones,
hooks and more. Nothing in this package imports mmela, torch or mmengine before the
arguments of a command are parsed.
"""
