"""Results as pages: one HTML file without network needs, Markdown, and plain text for a terminal."""
