"""Files of human preferences as a task; every row that is left out is counted and named by its line."""
