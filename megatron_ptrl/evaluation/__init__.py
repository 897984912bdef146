"""What came of a run: tables and plots of its metrics, for one run or several side by side."""
