"""A trained model measured on rows that it was not trained on."""
