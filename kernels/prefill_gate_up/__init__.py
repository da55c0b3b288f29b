"""Gate and up projections and SiLU of many tokens' experts."""
