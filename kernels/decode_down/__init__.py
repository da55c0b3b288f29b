"""Down projection and weighted sum of a few tokens' experts."""
