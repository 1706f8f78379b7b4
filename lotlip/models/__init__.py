"""The model.

To read it, start with `text_tower` (mask and corner tokens), go on with `lotlip` (both towers, as users call them) and
`pretraining` (the features that the loss compares). The others build, prepare, save and describe what these three are.
"""
