"""Protected texts and corpora as they come in files; knows no model."""
