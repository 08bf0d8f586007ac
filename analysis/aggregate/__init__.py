"""Values across runs: by sample, by domain and by column, with their spread and agreement."""
