"""A page for exploring a model: text → image and image → text search with relevance maps."""
