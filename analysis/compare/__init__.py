"""Groups of finished runs held against each other."""
