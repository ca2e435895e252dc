"""From raw videos and images to a training set: probe, cut, filter, caption, resize, write."""
