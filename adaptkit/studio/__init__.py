"""The studio: a page on this machine in which a classifier is made without code.

A project is a folder (`project`), its images come in through `pictures`, an `engine` answers from stored features, and
`app` is what the page in `page/` talks to.
"""
