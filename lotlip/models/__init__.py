"""The model.

To read it, start with `corner_mask` (who sees whom) and `text_tower` (features), go on with `lotlip` (both towers, as
users call them) and `pretraining` (the features that the loss compares). The others build, prepare, save and describe
what these are.
"""
