"""Drawing, and the pictures of a decision that the hook sends to trackers."""
