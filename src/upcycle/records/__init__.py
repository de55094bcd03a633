"""What one part of the program writes for another: a record for each file, and the place of each file (`files`)."""
