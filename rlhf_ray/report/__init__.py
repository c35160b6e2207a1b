"""The results page: one HTML file that shows a sweep, while it runs and after. No Ray here.

gathering   a sweep's files -> the plain dictionary that everything here shows
explain     what was learned: in words, as paths, as a map, and what choices hang on
figures     for notebooks: the front as a plotly figure, a result's short HTML
page        the dictionary -> HTML (templates/), whole or the part that changes
live        rewrites the page while a sweep runs
serving     the page on 127.0.0.1
__main__    `python -m rlhf_ray.report`
"""
