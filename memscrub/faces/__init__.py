"""A report as HTML, JUnit, SARIF, Markdown and for CI systems; decides nothing."""
