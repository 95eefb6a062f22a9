"""What an edit does to ordinary text, neighbours, benign prompts and utility tasks."""
