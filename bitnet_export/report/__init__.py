"""The report: one schema, stored as JSON; HTML, Markdown and JUnit only render it.

Gates judge the rows that verify/ measured; nothing is measured here, and nothing is imported
here, so that reading a report needs neither torch nor ONNX.
"""
