"""The towers and the dual encoder that joins them."""
