"""Steps of several iterations compiled into one call; README.md says what it buys and how to switch it off."""
