"""Commands of ``mmela`` that belong to no other package."""
