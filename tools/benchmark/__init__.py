"""How fast networks with layer attention are, and what memory they take."""
