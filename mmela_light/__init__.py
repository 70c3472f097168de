"""What has to run without torch: the command line, and a finder that torch calls.

``import mmela`` registers backbones, hooks and more, and imports torch and mmengine
for that. Nothing in this package imports mmela, torch or mmengine before a command has
its arguments.
"""
