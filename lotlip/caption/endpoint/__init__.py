"""An OpenAI-compatible server: its client, what is sent to it, and what its errors mean."""
