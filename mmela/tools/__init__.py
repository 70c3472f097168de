"""Commands of ``mmela`` that have no other place: arguments, and one call."""
