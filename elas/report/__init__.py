"""`elas report`: a run, or several, as one self-contained HTML page, from their files only.

run_files.py   reads the files of a run
incidents.py   what happened to it, from its events and its configuration's history
series.py      columns as arrays, thinned so that extremes stay
charts.py      bokeh's figures
tables.py      summary, plan against actual, evaluations, configuration
page.py        the HTML, from page.html
cli.py         the command
"""
