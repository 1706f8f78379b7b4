"""Stage `pretrain`: contrastive training of the text tower."""
