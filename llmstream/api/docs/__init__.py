"""The OpenAPI document and its pages. Nothing here but ``pages`` is imported before somebody asks for the document."""
