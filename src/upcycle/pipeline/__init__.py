"""A recipe in its folder: the stages as rows, what is done, what is resumed, how it is sealed, what it cost."""
