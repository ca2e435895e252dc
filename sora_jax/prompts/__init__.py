"""What stands between the words of a user and the text encoder: writers, weights, time stamps."""
