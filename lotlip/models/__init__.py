"""The model.

Start reading at `corner_mask` (the attention mask) and `text_tower` (text features). `lotlip` joins both towers in the
model that users load; `lotlip.pretrain.model` adds the features that the loss compares. The other modules configure the
model, prepare its inputs, save it and describe it.
"""
