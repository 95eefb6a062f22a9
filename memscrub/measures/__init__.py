"""What a model gives away of a text; changes nothing and judges nothing."""
