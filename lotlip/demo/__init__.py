"""The demo's generated world: pictures, captions, questions and an image tower. Own data needs none of it."""
