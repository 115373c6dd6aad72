"""The commands as functions: one public function each, a report returned, nothing printed."""
