"""Reports: tables with tests, plots and one HTML page, from folders of results."""
