# Non-local blocks, for comparison. MMDetection puts a plug-in into all blocks
# of a stage: one in each of the 4 of stage 2 costs about as many parameters as
# the single block in stage 3 of the papers' "1 NL".
backbone = dict(
    plugins=[
        dict(
            cfg=dict(type='NonLocal2d', reduction=2),
            stages=(False, True, False, False),
            position='after_conv3',
        )
    ]
)
