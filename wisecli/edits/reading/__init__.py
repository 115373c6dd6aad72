"""Files of edits in any layout → records with known field names."""
