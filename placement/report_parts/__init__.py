"""What a report's page is made of: curves, figures, page."""
