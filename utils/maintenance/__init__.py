"""For those who maintain the course: records in images/, the README's tables, measured speeds."""
