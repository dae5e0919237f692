"""What every report is made of: one page, its pictures for light and dark, and parts of charts."""
