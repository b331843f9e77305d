"""A made-up world: entities, documents about them, tools that find those, and questions that only they can answer."""
