# One non-local block, in the last but one block of stage 3. It adds nothing at
# first, so a plain ResNet's checkpoint is its start.
_base_ = './nl_in1k.py'
