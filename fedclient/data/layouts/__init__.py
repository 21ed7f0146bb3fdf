"""One file for each way in which data sets are handed round: whether a folder is laid out so, and its cases."""
