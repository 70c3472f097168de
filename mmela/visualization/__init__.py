"""Drawing, and the pictures of a decision, which the hook sends to trackers too."""
