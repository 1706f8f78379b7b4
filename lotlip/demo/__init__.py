"""The demo's generated world: pictures, captions, questions and an image tower. Your own data does not need it."""
