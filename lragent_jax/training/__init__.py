"""Trains LoRA agents for any base the engine loads."""
