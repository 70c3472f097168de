# One non-local block, in the last but one block of stage 3. At first it adds nothing,
# so it can start from the checkpoint of a plain ResNet.
_base_ = './nl_in1k.py'
