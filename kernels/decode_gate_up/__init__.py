"""Gate and up projections and SiLU of a few tokens' experts."""
