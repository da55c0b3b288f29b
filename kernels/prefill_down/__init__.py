"""Down projection of many tokens' experts."""
