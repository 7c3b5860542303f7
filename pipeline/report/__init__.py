"""The page, the plots and the table a run ends with."""
